//! YAML text becomes a tree whose every node knows where it was written and what its path is.
//!
//! Stricter than YAML: one document, no anchors, aliases or tags (an alias can blow a small file up to any
//! size), text as keys. The tree is bounded in size and depth, so that walking it cannot exhaust the stack.

use std::str::FromStr;

use saphyr_parser::{Event, Parser, ScalarStyle, Span};
use serde::de::{
    DeserializeOwned, IntoDeserializer,
    value::{Error as ValueError, StrDeserializer},
};

use super::fault::{Fault, Position, Source, quoted};

/// The largest file that is read, in bytes: room for a hundred thousand endpoints.
pub(super) const MAX_TEXT_BYTES: usize = 32 << 20;
/// The deepest nesting; the deepest that a correct file needs is 8.
const MAX_DEPTH: usize = 24;
/// The most keys of one map. Keys are searched one after the other, so this also bounds the time.
const MAX_KEYS: usize = 20_000;

/// A value of a configuration, where it was written, and its path.
#[derive(Clone, Debug)]
pub(super) struct Node {
    pub(super) at: Position,
    /// `services.reports.endpoints[0].url`; filled in by [`Node::name_paths`].
    pub(super) path: String,
    pub(super) value: Value,
}

#[derive(Clone, Debug)]
pub(super) enum Value {
    /// Text as written, and whether it stood there without quotes (then it may mean null, a number or a
    /// boolean, as its reader expects).
    Scalar {
        text: String,
        plain: bool,
    },
    List(Vec<Node>),
    Map(Vec<Entry>),
}

/// A key and its value, in the order of the text.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) key: String,
    pub(super) at: Position,
    pub(super) value: Node,
}

impl Node {
    pub(super) fn new(at: Position, value: Value) -> Self {
        Self { at, path: String::new(), value }
    }

    /// A node that says `text`, as from a variable or flag.
    pub(super) fn text(at: Position, text: &str) -> Self {
        Self::new(at, Value::Scalar { text: text.to_owned(), plain: true })
    }

    /// YAML 1.2 core schema: nothing at all, `~` or `null`.
    pub(super) fn is_null(&self) -> bool {
        match &self.value {
            Value::Scalar { text, plain } => {
                *plain && matches!(text.as_str(), "" | "~" | "null" | "Null" | "NULL")
            }
            Value::List(_) | Value::Map(_) => false,
        }
    }

    /// The text of a scalar that is not null.
    pub(super) fn scalar(&self) -> Option<&str> {
        match &self.value {
            Value::Scalar { text, .. } if !self.is_null() => Some(text),
            Value::Scalar { .. } | Value::List(_) | Value::Map(_) => None,
        }
    }

    /// The text of a scalar that stands without quotes and is not null.
    pub(super) fn plain(&self) -> Option<&str> {
        match &self.value {
            Value::Scalar { text, plain: true } if !self.is_null() => Some(text),
            Value::Scalar { .. } | Value::List(_) | Value::Map(_) => None,
        }
    }

    pub(super) fn entries(&self) -> &[Entry] {
        match &self.value {
            Value::Map(entries) => entries,
            Value::Scalar { .. } | Value::List(_) => &[],
        }
    }

    pub(super) fn items(&self) -> &[Self] {
        match &self.value {
            Value::List(items) => items,
            Value::Scalar { .. } | Value::Map(_) => &[],
        }
    }

    /// The value under `key`, null as if it were not there.
    pub(super) fn get(&self, key: &str) -> Option<&Self> {
        let entry = self.entries().iter().find(|entry| entry.key == key)?;
        Some(&entry.value).filter(|value| !value.is_null())
    }

    /// Whether `key` is written here, be it with null.
    pub(super) fn has(&self, key: &str) -> bool {
        self.entries().iter().any(|entry| entry.key == key)
    }

    /// This node, to read settings from.
    pub(super) fn here(&self) -> At<'_> {
        At(Some(self))
    }

    /// This scalar as a `T`.
    pub(super) fn parse<T: FromStr>(&self) -> Option<T> {
        self.scalar()?.parse().ok()
    }

    /// What stands here, as a fault shows it.
    pub(super) fn found(&self) -> String {
        match &self.value {
            _ if self.is_null() => "nothing".to_owned(),
            Value::Scalar { text, .. } => quoted(text),
            Value::List(_) => "a list".to_owned(),
            Value::Map(_) => "a map".to_owned(),
        }
    }

    /// A fault of this value.
    pub(super) fn fault(&self, advice: impl Into<String>) -> Fault {
        self.fault_found(self.found(), advice)
    }

    /// A fault of this value, which is described as `found`.
    pub(super) fn fault_found(&self, found: impl Into<String>, advice: impl Into<String>) -> Fault {
        Fault {
            at: self.at.clone(),
            path: self.path.clone(),
            found: found.into(),
            advice: advice.into(),
        }
    }

    /// A fault of a key that should be here and is not.
    pub(super) fn missing(&self, key: &str, advice: impl Into<String>) -> Fault {
        Fault {
            at: self.at.clone(),
            path: join(&self.path, key),
            found: "nothing".to_owned(),
            advice: advice.into(),
        }
    }

    /// Gives every node below its path.
    pub(super) fn name_paths(&mut self) {
        match &mut self.value {
            Value::Scalar { .. } => {}
            Value::List(items) => {
                for (at, item) in items.iter_mut().enumerate() {
                    item.path = format!("{}[{at}]", self.path);
                    item.name_paths();
                }
            }
            Value::Map(entries) => {
                for entry in entries {
                    entry.value.path = join(&self.path, &entry.key);
                    entry.value.name_paths();
                }
            }
        }
    }
}

/// A place where a node may be. What is wrong there reads as `None`: the shape's check has reported it.
#[derive(Clone, Copy)]
pub(super) struct At<'a>(pub(super) Option<&'a Node>);

impl<'a> At<'a> {
    /// The value under `key`, null as if it were not there.
    pub(super) fn key(self, key: &str) -> Self {
        Self(self.0.and_then(|node| node.get(key)))
    }

    /// Whether null is written under `key`.
    pub(super) fn says_null(self, key: &str) -> bool {
        self.0.is_some_and(|node| node.has(key) && node.get(key).is_none())
    }

    pub(super) fn text(self) -> Option<&'a str> {
        self.0?.scalar()
    }

    pub(super) fn parse<T: FromStr>(self) -> Option<T> {
        self.0?.parse()
    }

    /// The scalar as `read` understands it.
    pub(super) fn with<T>(self, read: impl FnOnce(&str) -> Option<T>) -> Option<T> {
        read(self.text()?)
    }

    /// The scalar as one of the words of an enum, as the enum itself writes them.
    pub(super) fn word<T: DeserializeOwned>(self) -> Option<T> {
        let word: StrDeserializer<'_, ValueError> = self.text()?.into_deserializer();
        T::deserialize(word).ok()
    }

    pub(super) fn flag(self) -> Option<bool> {
        match self.0?.plain()? {
            "true" | "True" | "TRUE" => Some(true),
            "false" | "False" | "FALSE" => Some(false),
            _ => None,
        }
    }

    pub(super) fn items(self) -> &'a [Node] {
        self.0.map_or(&[], Node::items)
    }

    pub(super) fn entries(self) -> &'a [Entry] {
        self.0.map_or(&[], Node::entries)
    }

    /// The items of a list, or the one value that stands in its place.
    pub(super) fn one_or_many(self) -> &'a [Node] {
        match self.0 {
            Some(Node { value: Value::List(items), .. }) => items,
            Some(node) => std::slice::from_ref(node),
            None => &[],
        }
    }
}

/// `parent.key`; a key with other characters than names have is quoted.
pub(super) fn join(parent: &str, key: &str) -> String {
    let plain = !key.is_empty()
        && key.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-'));
    let key = if plain { key.to_owned() } else { quoted(key) };
    if parent.is_empty() { key } else { format!("{parent}.{key}") }
}

/// Reads one YAML document. What can be read is read in spite of duplicate keys, whose faults go to `faults`;
/// `None` after a fault that makes the text unreadable. An empty text is an empty map.
pub(super) fn parse(text: &str, source: &Source, faults: &mut Vec<Fault>) -> Option<Node> {
    let mut builder = Builder { source, faults, stack: Vec::new(), root: None };
    match builder.run(text) {
        Ok(()) => {
            let nothing = Position { source: source.clone(), line: 1, column: 1 };
            let mut root =
                builder.root.unwrap_or_else(|| Node::new(nothing, Value::Map(Vec::new())));
            if root.is_null() {
                root.value = Value::Map(Vec::new());
            }
            root.name_paths();
            Some(root)
        }
        Err(fault) => {
            faults.push(*fault);
            None
        }
    }
}

/// A collection that is still open.
enum Open {
    List(Position, Vec<Node>),
    /// The entries so far, and the key whose value comes next.
    Map(Position, Vec<Entry>, Option<(String, Position)>),
}

struct Builder<'a> {
    source: &'a Source,
    faults: &'a mut Vec<Fault>,
    stack: Vec<Open>,
    root: Option<Node>,
}

impl Builder<'_> {
    fn run(&mut self, text: &str) -> Result<(), Box<Fault>> {
        if text.len() > MAX_TEXT_BYTES {
            let found = format!("{} bytes", text.len());
            return Err(self.fault_at(None, found, "keep the file below 32 MiB"));
        }
        // The pull interface, because the push one recurses with the depth of the text.
        let mut parser = Parser::new_from_str(text.strip_prefix('\u{feff}').unwrap_or(text));
        while let Some(event) = parser.next_event() {
            match event {
                Ok((event, span)) => self.take(event, span)?,
                Err(error) => {
                    let at = Span::empty(*error.marker());
                    let found = format!("text that is no YAML ({})", error.info());
                    let advice = "check indentation, quotes and brackets up to here";
                    return Err(self.fault_at(Some(at), found, advice));
                }
            }
        }
        Ok(())
    }

    fn take(&mut self, event: Event<'_>, span: Span) -> Result<(), Box<Fault>> {
        let (anchor, tag) = match &event {
            Event::Scalar(_, _, anchor, tag) => (*anchor, tag.as_ref()),
            Event::SequenceStart(anchor, tag) | Event::MappingStart(anchor, tag) => {
                (*anchor, tag.as_ref())
            }
            Event::Alias(_)
            | Event::Nothing
            | Event::StreamStart
            | Event::StreamEnd
            | Event::DocumentStart(_)
            | Event::DocumentEnd
            | Event::SequenceEnd
            | Event::MappingEnd => (0, None),
        };
        if anchor != 0 || matches!(event, Event::Alias(_)) {
            return Err(self.fault_at(
                Some(span),
                "an anchor or alias".to_owned(),
                "write the value out; anchors (&) and aliases (*) are not read",
            ));
        }
        if tag.is_some() {
            return Err(self.fault_at(
                Some(span),
                "a tag".to_owned(),
                "leave it out; tags (!) are not read",
            ));
        }
        let at = self.position(span);
        match event {
            Event::Scalar(text, style, ..) => {
                let plain = style == ScalarStyle::Plain;
                self.value(Node::new(at, Value::Scalar { text: text.into_owned(), plain }), span)
            }
            Event::SequenceStart(..) => self.open(Open::List(at, Vec::new()), span),
            Event::MappingStart(..) => self.open(Open::Map(at, Vec::new(), None), span),
            Event::SequenceEnd | Event::MappingEnd => self.close(span),
            Event::DocumentStart(_) if self.root.is_some() => Err(self.fault_at(
                Some(span),
                "a second document".to_owned(),
                "keep one document per file",
            )),
            Event::DocumentStart(_)
            | Event::DocumentEnd
            | Event::Alias(_)
            | Event::Nothing
            | Event::StreamStart
            | Event::StreamEnd => Ok(()),
        }
    }

    fn open(&mut self, open: Open, span: Span) -> Result<(), Box<Fault>> {
        if self.stack.len() >= MAX_DEPTH {
            let advice = "no setting is nested this deep";
            return Err(self.fault_at(Some(span), format!("{MAX_DEPTH} levels"), advice));
        }
        self.stack.push(open);
        Ok(())
    }

    fn close(&mut self, span: Span) -> Result<(), Box<Fault>> {
        match self.stack.pop() {
            Some(Open::List(at, items)) => self.value(Node::new(at, Value::List(items)), span),
            Some(Open::Map(at, entries, _)) => self.value(Node::new(at, Value::Map(entries)), span),
            None => Ok(()),
        }
    }

    /// Puts a finished value where it belongs: it is a key, the value of one, an item, or the document.
    fn value(&mut self, node: Node, span: Span) -> Result<(), Box<Fault>> {
        match self.stack.last_mut() {
            None => self.root = Some(node),
            Some(Open::List(_, items)) => items.push(node),
            Some(Open::Map(_, entries, pending)) => match pending.take() {
                Some((key, at)) => entries.push(Entry { key, at, value: node }),
                None => {
                    let Value::Scalar { text: key, .. } = node.value else {
                        return Err(self.fault_at(
                            Some(span),
                            "a list or map as a key".to_owned(),
                            "write a name",
                        ));
                    };
                    if entries.len() >= MAX_KEYS {
                        let found = format!("more than {MAX_KEYS} keys");
                        return Err(self.fault_at(Some(span), found, "keep fewer in one map"));
                    }
                    let first = entries.iter().find(|entry| entry.key == key);
                    let first = first.map(|entry| entry.at.line);
                    *pending = Some((key, node.at.clone()));
                    if let Some(line) = first {
                        self.duplicate(node.at, line);
                    }
                }
            },
        }
        Ok(())
    }

    /// The key that was just read is in its map already.
    fn duplicate(&mut self, at: Position, first_line: usize) {
        let mut path = String::new();
        for open in &self.stack {
            match open {
                Open::List(_, items) => path.push_str(&format!("[{}]", items.len())),
                Open::Map(_, _, Some((key, _))) => path = join(&path, key),
                Open::Map(_, _, None) => {}
            }
        }
        let advice = match at.source {
            Source::File(_) => format!("keep one of them; the first is on line {first_line}"),
            Source::Variable(_) | Source::Flag(_) => "keep one of them".to_owned(),
        };
        self.faults.push(Fault { at, path, found: "this key a second time".to_owned(), advice });
    }

    fn position(&self, span: Span) -> Position {
        // Inside a variable there is no line that would help.
        let (line, column) = match self.source {
            Source::File(_) => (span.start.line(), span.start.col() + 1),
            Source::Variable(_) | Source::Flag(_) => (0, 0),
        };
        Position { source: self.source.clone(), line, column }
    }

    fn fault_at(&self, span: Option<Span>, found: String, advice: &str) -> Box<Fault> {
        let at = match span {
            Some(span) => self.position(span),
            None => Position::whole(self.source.clone()),
        };
        Box::new(Fault { at, path: String::new(), found, advice: advice.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::prelude::*;

    use super::*;

    fn read(text: &str) -> (Option<Node>, Vec<String>) {
        let mut faults = Vec::new();
        let node = parse(text, &Source::File(Path::new("x.yaml").into()), &mut faults);
        (node, faults.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn every_node_knows_its_line_and_path() {
        let (node, faults) = read("a:\n  - b: 1\n    c: [x, 'y']\n");
        assert_eq!(faults, [""; 0]);
        let list = node.unwrap();
        let item = &list.get("a").unwrap().items()[0];
        let y = &item.get("c").unwrap().items()[1];
        assert_eq!((y.path.as_str(), y.at.line, y.at.column), ("a[0].c[1]", 3, 12));
        assert_eq!(item.here().key("b").parse::<u8>(), Some(1));
    }

    #[test]
    fn anchors_tags_documents_and_depth_are_refused() {
        for (text, fault) in [
            ("a: &x 1\nb: *x", "x.yaml:1:4: found an anchor or alias;"),
            ("a: !!int 1", "found a tag;"),
            ("a: 1\n---\nb: 2", "x.yaml:2:1: found a second document;"),
            ("? [a]\n: 1", "found a list or map as a key;"),
            ("a: [", "found text that is no YAML"),
        ] {
            let (node, faults) = read(text);
            assert!(node.is_none(), "{text:?}");
            assert!(faults[0].contains(fault), "{faults:?}");
        }
        let (node, faults) = read(&"[".repeat(10_000));
        assert!(node.is_none());
        assert_eq!(faults.len(), 1);
    }

    #[test]
    fn a_key_that_is_written_twice_is_a_fault_and_reading_goes_on() {
        let (node, faults) = read("a: 1\nb:\n  - {c: 1, c: 2}\na: 3\n");
        assert!(node.is_some());
        assert_eq!(
            faults,
            [
                "x.yaml:3:12: b[0].c: found this key a second time; keep one of them; the first is on line 3",
                "x.yaml:4:1: a: found this key a second time; keep one of them; the first is on line 1",
            ]
        );
    }

    #[test]
    fn an_empty_text_is_an_empty_map() {
        for text in ["", "# nothing\n", "---\n", "null"] {
            let (node, faults) = read(text);
            assert!(faults.is_empty(), "{faults:?}");
            assert!(matches!(node.unwrap().value, Value::Map(entries) if entries.is_empty()));
        }
    }

    proptest! {
        #[test]
        fn no_text_panics_the_reader(text in "[ \\-a-c:{}\\[\\],&*!|>#'\"%@`\n\t?0-9]{0,80}") {
            let _ = read(&text);
        }

        #[test]
        fn no_unicode_panics_the_reader(text in any::<String>()) {
            let _ = read(&text);
        }
    }
}
