//! Strict JSON for tokens: text that is borrowed where it can be, and no member twice.
//!
//! RFC 8259 §4 leaves the meaning of a repeated member open, so two readers of one token could see two
//! different subjects. Such objects are refused, at every depth; so are objects with more members than any
//! token needs.

use std::{borrow::Cow, fmt};

use serde::{
    Deserialize, Deserializer,
    de::{DeserializeSeed, Error, MapAccess, SeqAccess, Visitor},
};
use smallvec::SmallVec;

/// More members than any token of the field has; keeps the search for repeated ones cheap.
const MAX_MEMBERS: usize = 128;

/// A JSON string, borrowed from the input unless it has escapes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Text<'a>(pub(super) Cow<'a, str>);

impl<'de> Deserialize<'de> for Text<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_str(TextVisitor).map(Self)
    }
}

struct TextVisitor;

impl<'de> Visitor<'de> for TextVisitor {
    type Value = Cow<'de, str>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string")
    }

    fn visit_borrowed_str<E: Error>(self, text: &'de str) -> Result<Self::Value, E> {
        Ok(Cow::Borrowed(text))
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
        Ok(Cow::Owned(text.to_owned()))
    }
}

/// The members of one object seen so far.
#[derive(Default)]
pub(super) struct Members<'de>(SmallVec<[Cow<'de, str>; 24]>);

impl<'de> Members<'de> {
    /// The next member's name.
    pub(super) fn next<A: MapAccess<'de>>(
        &mut self,
        map: &mut A,
    ) -> Result<Option<&str>, A::Error> {
        let Some(Text(name)) = map.next_key::<Text<'de>>()? else { return Ok(None) };
        if self.0.len() >= MAX_MEMBERS || self.0.contains(&name) {
            return Err(A::Error::custom("a member twice, or too many"));
        }
        self.0.push(name);
        Ok(self.0.last().map(AsRef::as_ref))
    }
}

/// One string or a list of them: `aud` (RFC 7519 §4.1.3).
#[derive(Debug, Default)]
pub(super) struct Strings<'a>(pub(super) SmallVec<[Cow<'a, str>; 2]>);

impl<'de> Deserialize<'de> for Strings<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OneOrMany;
        impl<'de> Visitor<'de> for OneOrMany {
            type Value = Strings<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or a list of strings")
            }

            fn visit_borrowed_str<E: Error>(self, text: &'de str) -> Result<Self::Value, E> {
                Ok(Strings(SmallVec::from_iter([Cow::Borrowed(text)])))
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
                Ok(Strings(SmallVec::from_iter([Cow::Owned(text.to_owned())])))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
                let mut all = SmallVec::new();
                while let Some(Text(text)) = list.next_element()? {
                    all.push(text);
                }
                Ok(Strings(all))
            }
        }
        deserializer.deserialize_any(OneOrMany)
    }
}

/// A `NumericDate` (RFC 7519 §2): seconds since 1970, of which there may be a fraction. Strings and numbers beyond `i64`
/// are refused.
pub(super) struct Seconds {
    /// The last whole second before or at it: for an end.
    pub(super) floor: i64,
    /// The first one at or after it: for a beginning.
    pub(super) ceiling: i64,
}

impl<'de> Deserialize<'de> for Seconds {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(SecondsVisitor)
    }
}

struct SecondsVisitor;

impl Visitor<'_> for SecondsVisitor {
    type Value = Seconds;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a number of seconds")
    }

    fn visit_i64<E: Error>(self, whole: i64) -> Result<Seconds, E> {
        Ok(Seconds { floor: whole, ceiling: whole })
    }

    fn visit_u64<E: Error>(self, whole: u64) -> Result<Seconds, E> {
        self.visit_i64(i64::try_from(whole).map_err(E::custom)?)
    }

    fn visit_f64<E: Error>(self, number: f64) -> Result<Seconds, E> {
        // Below 2^63, and no NaN.
        if !(-9e18..=9e18).contains(&number) {
            return Err(E::custom("a time beyond all time"));
        }
        #[expect(
            clippy::cast_possible_truncation,
            reason = "a whole number within i64, as was checked"
        )]
        let whole = |number: f64| number as i64;
        Ok(Seconds { floor: whole(number.floor()), ceiling: whole(number.ceil()) })
    }
}

/// Any value, looked through for repeated members and otherwise passed over.
pub(super) struct Unused;

impl<'de> DeserializeSeed<'de> for Unused {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(UnusedVisitor)
    }
}

struct UnusedVisitor;

impl<'de> Visitor<'de> for UnusedVisitor {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_bool<E: Error>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E: Error>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E: Error>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E: Error>(self, _: &str) -> Result<(), E> {
        Ok(())
    }

    fn visit_unit<E: Error>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        while list.next_element_seed(Unused)?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut members = Members::default();
        while members.next(&mut map)?.is_some() {
            map.next_value_seed(Unused)?;
        }
        Ok(())
    }
}
