//! Lengths of time as people write them: `25ms`, `5s`, `1m 30s`, `7d`.
//!
//! Also a serde adapter (`#[serde(with = "span")]`, and [`option`] for what may be `null`).

use std::time::Duration;

use jiff::{Span, SpanRelativeTo};
use serde::{Deserialize, Deserializer, Serializer};

/// Why a length of time was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a length of time is written 25ms, 5s, 1m or 7d")]
pub struct SpanError;

/// The longest that is read: a hundred years. Every unit can say it, so that what is printed can be read, and adding it to
/// a moment does not overflow.
const LONGEST: Duration = Duration::from_secs(36_525 * 86_400);

/// Reads a length of time; a day has 24 hours.
///
/// # Errors
/// [`SpanError`] for anything but a non-negative number with a unit, and for more than a hundred years.
pub fn parse(text: &str) -> Result<Duration, SpanError> {
    let span: Span = text.trim().parse().map_err(|_source| SpanError)?;
    let signed =
        span.to_duration(SpanRelativeTo::days_are_24_hours()).map_err(|_source| SpanError)?;
    let span = Duration::try_from(signed).map_err(|_source| SpanError)?;
    if span <= LONGEST { Ok(span) } else { Err(SpanError) }
}

/// Writes a length of time in the largest unit that keeps it whole.
#[must_use]
pub fn print(span: Duration) -> String {
    let nanos = span.as_nanos();
    let units: [(u128, &str); 7] = [
        (86_400_000_000_000, "d"),
        (3_600_000_000_000, "h"),
        (60_000_000_000, "m"),
        (1_000_000_000, "s"),
        (1_000_000, "ms"),
        (1_000, "us"),
        (1, "ns"),
    ];
    if nanos == 0 {
        return "0s".to_owned();
    }
    units
        .iter()
        .find(|(unit, _)| nanos.is_multiple_of(*unit))
        .map_or_else(|| format!("{nanos}ns"), |(unit, name)| format!("{}{name}", nanos / unit))
}

/// For `#[serde(with = "span")]`.
///
/// # Errors
/// Those of the serializer.
pub fn serialize<S: Serializer>(span: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&print(*span))
}

/// For `#[serde(with = "span")]`.
///
/// # Errors
/// Those of the deserializer, and [`SpanError`].
pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    parse(&String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
}

/// The same for `Option<Duration>`.
pub mod option {
    use super::{Deserialize, Deserializer, Duration, Serializer, parse, print};

    /// For `#[serde(with = "span::option")]`.
    ///
    /// # Errors
    /// Those of the serializer.
    pub fn serialize<S: Serializer>(
        span: &Option<Duration>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        match span {
            Some(span) => serializer.serialize_some(&print(*span)),
            None => serializer.serialize_none(),
        }
    }

    /// For `#[serde(with = "span::option")]`.
    ///
    /// # Errors
    /// Those of the deserializer, and a length of time that cannot be read.
    pub fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Duration>, D::Error> {
        Option::<String>::deserialize(deserializer)?
            .map(|text| parse(&text).map_err(serde::de::Error::custom))
            .transpose()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn people_write_times_in_many_units() {
        assert_eq!(parse("25ms").unwrap(), Duration::from_millis(25));
        assert_eq!(parse("7d").unwrap(), Duration::from_secs(7 * 86_400));
        assert_eq!(parse("1m30s").unwrap(), Duration::from_secs(90));
        for bad in ["", "3", "3 sec onds", "-1s", "five", "36526d", "15050003040m"] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn printing_and_reading_is_the_identity(millis in 0u64..1_000_000_000) {
            let span = Duration::from_millis(millis);
            prop_assert_eq!(parse(&print(span)).unwrap(), span);
        }
    }
}
