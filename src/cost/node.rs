//! The price book's YAML as a tree whose leaves are still text.
//!
//! A library tree would turn `0.09` into a float before we can see it. Anchors and tags have no use in a price book:
//! an alias is an empty leaf, a tag is not looked at.

use std::borrow::Cow;

use saphyr_parser::{Event, Parser, ScanError};

/// One node.
#[derive(Debug)]
pub(super) enum Node<'a> {
    Text(Cow<'a, str>),
    List(Vec<Self>),
    Map(Vec<(Self, Self)>),
}

/// A collection that is still being read.
enum Open<'a> {
    List(Vec<Node<'a>>),
    /// The second is a key whose value has not come yet.
    Map(Vec<(Node<'a>, Node<'a>)>, Option<Node<'a>>),
}

impl<'a> Node<'a> {
    /// Reads the first document; an empty text is an empty leaf.
    pub(super) fn parse(text: &'a str) -> Result<Self, ScanError> {
        let mut open: Vec<Open<'a>> = Vec::new();
        for event in Parser::new_from_str(text) {
            let (event, _span) = event?;
            let node = match event {
                Event::SequenceStart(..) => {
                    open.push(Open::List(Vec::new()));
                    continue;
                }
                Event::MappingStart(..) => {
                    open.push(Open::Map(Vec::new(), None));
                    continue;
                }
                Event::Scalar(text, ..) => Self::Text(text),
                Event::Alias(_) => Self::Text(Cow::Borrowed("")),
                Event::SequenceEnd | Event::MappingEnd => match open.pop() {
                    Some(Open::List(items)) => Self::List(items),
                    Some(Open::Map(entries, _)) => Self::Map(entries),
                    None => continue,
                },
                Event::Nothing
                | Event::StreamStart
                | Event::StreamEnd
                | Event::DocumentStart(_)
                | Event::DocumentEnd => continue,
            };
            match open.last_mut() {
                None => return Ok(node),
                Some(Open::List(items)) => items.push(node),
                Some(Open::Map(entries, key)) => match key.take() {
                    None => *key = Some(node),
                    Some(key) => entries.push((key, node)),
                },
            }
        }
        Ok(Self::Text(Cow::Borrowed("")))
    }

    /// A leaf as it was written, without its quotes.
    pub(super) fn text(&self) -> Option<&str> {
        if let Self::Text(text) = self { Some(text) } else { None }
    }

    /// The items of a list; none of anything else.
    pub(super) fn items(&self) -> impl Iterator<Item = &Self> {
        if let Self::List(items) = self { items.as_slice() } else { &[] }.iter()
    }

    /// The entries of a map whose keys are text; none of anything else.
    pub(super) fn entries(&self) -> impl Iterator<Item = (&str, &Self)> {
        let entries = if let Self::Map(entries) = self { entries.as_slice() } else { &[] };
        entries.iter().filter_map(|(key, value)| Some((key.text()?, value)))
    }

    /// The value of a key.
    pub(super) fn field(&self, key: &str) -> Option<&Self> {
        self.entries().find(|(name, _)| *name == key).map(|(_, value)| value)
    }

    /// The text at a key.
    pub(super) fn text_of(&self, key: &str) -> Option<&str> {
        self.field(key)?.text()
    }

    /// The items at a key.
    pub(super) fn items_of(&self, key: &str) -> impl Iterator<Item = &Self> {
        self.field(key).into_iter().flat_map(Self::items)
    }

    /// The entries at a key.
    pub(super) fn entries_of(&self, key: &str) -> impl Iterator<Item = (&str, &Self)> {
        self.field(key).into_iter().flat_map(Self::entries)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_stay_as_they_were_written() {
        let root = Node::parse("a: {b: [[null, 0.10], [2, '3']]}\nc: \"x\"").unwrap();
        let a = root.field("a").unwrap();
        let leaves: Vec<_> = a.items_of("b").flat_map(Node::items).filter_map(Node::text).collect();
        assert_eq!(leaves, ["null", "0.10", "2", "3"]);
        assert_eq!(root.text_of("c"), Some("x"));
        assert_eq!(root.text_of("a"), None);
        assert!(Node::parse("a: [").is_err());
    }
}
