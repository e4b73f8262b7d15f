//! The header lines of one message, in the order they came.
//!
//! A proxy reads a head once, changes a handful of lines and writes it out again. For that a plain list is enough:
//! nothing is hashed, the order survives, and a look-up walks some ten entries that lie side by side. The number of
//! lines is bounded where a head is read, so walking stays cheap whatever a peer sends.

use http::{HeaderMap, HeaderName, HeaderValue};

/// Header lines; names compare as RFC 9110 §5.1 says, without case.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fields(Vec<(HeaderName, HeaderValue)>);

impl Fields {
    /// No lines.
    #[must_use]
    pub const fn new() -> Self {
        Self(Vec::new())
    }

    /// No lines, and room for `count`.
    #[must_use]
    pub fn with_capacity(count: usize) -> Self {
        Self(Vec::with_capacity(count))
    }

    /// How many lines there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The first value under `name`.
    #[must_use]
    pub fn get<N: ?Sized>(&self, name: &N) -> Option<&HeaderValue>
    where
        HeaderName: PartialEq<N>,
    {
        self.0.iter().find(|(known, _)| known == name).map(|(_, value)| value)
    }

    /// Every value under `name`, in order.
    pub fn all<'a, N: ?Sized>(&'a self, name: &'a N) -> impl Iterator<Item = &'a HeaderValue>
    where
        HeaderName: PartialEq<N>,
    {
        self.0.iter().filter(move |(known, _)| known == name).map(|(_, value)| value)
    }

    /// Whether there is a value under `name`.
    #[must_use]
    pub fn contains<N: ?Sized>(&self, name: &N) -> bool
    where
        HeaderName: PartialEq<N>,
    {
        self.0.iter().any(|(known, _)| known == name)
    }

    /// Adds a line behind the others.
    pub fn append(&mut self, name: HeaderName, value: HeaderValue) {
        self.0.push((name, value));
    }

    /// Makes `value` the only one under `name`; it takes the place of the first.
    pub fn set(&mut self, name: HeaderName, value: HeaderValue) {
        let Some(first) = self.0.iter().position(|(known, _)| *known == name) else {
            return self.0.push((name, value));
        };
        let mut index = 0;
        self.0.retain(|(known, _)| {
            index += 1;
            index <= first + 1 || *known != name
        });
        if let Some(line) = self.0.get_mut(first) {
            line.1 = value;
        }
    }

    /// Removes every line under `name`.
    pub fn remove<N: ?Sized>(&mut self, name: &N)
    where
        HeaderName: PartialEq<N>,
    {
        self.0.retain(|(known, _)| known != name);
    }

    /// Keeps the lines whose name is wanted.
    pub fn retain(&mut self, mut wanted: impl FnMut(&HeaderName) -> bool) {
        self.0.retain(|(name, _)| wanted(name));
    }

    /// The names, one per line.
    pub fn names(&self) -> impl Iterator<Item = &HeaderName> {
        self.0.iter().map(|(name, _)| name)
    }

    /// The lines.
    pub fn iter(&self) -> impl Iterator<Item = (&HeaderName, &HeaderValue)> {
        self.0.iter().map(|(name, value)| (name, value))
    }

    /// The same lines as the map that HTTP/2 asks for, but for those under `without`.
    #[must_use]
    pub fn to_map(&self, without: &HeaderName) -> HeaderMap {
        let mut map = HeaderMap::with_capacity(self.0.len());
        for (name, value) in self.0.iter().filter(|(name, _)| name != without) {
            map.append(name, value.clone());
        }
        map
    }
}

impl From<HeaderMap> for Fields {
    fn from(map: HeaderMap) -> Self {
        // Room for what the proxy adds, so that the list is allocated once.
        let mut lines: Vec<(HeaderName, HeaderValue)> = Vec::with_capacity(map.len() + 8);
        for (name, value) in map {
            // The map names only the first of several values.
            let name = name.or_else(|| lines.last().map(|(last, _)| last.clone()));
            if let Some(name) = name {
                lines.push((name, value));
            }
        }
        Self(lines)
    }
}

impl From<Fields> for HeaderMap {
    fn from(fields: Fields) -> Self {
        let mut map = Self::with_capacity(fields.0.len());
        for (name, value) in fields.0 {
            map.append(name, value);
        }
        map
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(lines: &[(&'static str, &'static str)]) -> Fields {
        let mut fields = Fields::new();
        for (name, value) in lines {
            fields.append(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        fields
    }

    #[test]
    fn a_line_that_is_set_takes_the_place_of_the_first_and_of_all_others() {
        let mut lines = fields(&[("a", "1"), ("b", "2"), ("a", "3"), ("c", "4")]);
        lines.set(HeaderName::from_static("a"), HeaderValue::from_static("5"));
        assert_eq!(lines, fields(&[("a", "5"), ("b", "2"), ("c", "4")]));
        lines.set(HeaderName::from_static("d"), HeaderValue::from_static("6"));
        assert_eq!(lines.get("D").unwrap(), "6");
    }

    #[test]
    fn the_order_survives_the_map_of_http2_within_each_name() {
        let lines = fields(&[("a", "1"), ("b", "2"), ("a", "3")]);
        let map = HeaderMap::from(lines.clone());
        let back = Fields::from(map);
        assert_eq!(back.all("a").collect::<Vec<_>>(), ["1", "3"]);
        assert_eq!(back.all("b").collect::<Vec<_>>(), ["2"]);
        assert_eq!(lines.to_map(&HeaderName::from_static("a")).len(), 1);
    }

    #[test]
    fn what_is_removed_is_gone_wherever_it_stood() {
        let mut lines = fields(&[("a", "1"), ("b", "2"), ("a", "3")]);
        lines.remove("a");
        assert_eq!(lines, fields(&[("b", "2")]));
        assert!(!lines.contains("a"));
    }
}
