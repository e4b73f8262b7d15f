//! Settings as YAML again, with their defaults: what `infrar check` prints, and what reads back as the same.

/// A piece of YAML to be written.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Shown {
    /// `null`.
    Null,
    /// A flag or number, without quotes.
    Word(String),
    /// Text, in quotes where it needs them.
    Text(String),
    List(Vec<Self>),
    Map(Vec<(String, Self)>),
}

impl Shown {
    #[expect(
        clippy::needless_pass_by_value,
        reason = "callers have numbers, references and what paths display as"
    )]
    pub(super) fn text(value: impl ToString) -> Self {
        Self::Text(value.to_string())
    }

    #[expect(
        clippy::needless_pass_by_value,
        reason = "callers have numbers, references and what paths display as"
    )]
    pub(super) fn word(value: impl ToString) -> Self {
        Self::Word(value.to_string())
    }

    pub(super) fn maybe<T>(value: Option<T>, show: impl FnOnce(T) -> Self) -> Self {
        value.map_or(Self::Null, show)
    }

    pub(super) fn list<T>(
        values: impl IntoIterator<Item = T>,
        show: impl FnMut(T) -> Self,
    ) -> Self {
        Self::List(values.into_iter().map(show).collect())
    }

    pub(super) fn map(entries: impl IntoIterator<Item = (impl ToString, Self)>) -> Self {
        Self::Map(entries.into_iter().map(|(key, value)| (key.to_string(), value)).collect())
    }

    /// The whole document.
    pub(super) fn yaml(&self) -> String {
        let mut text = String::new();
        self.block(&mut text, 0);
        text
    }

    /// Writes the lines of this value, each ending in a line break.
    fn block(&self, text: &mut String, indent: usize) {
        match self {
            Self::Map(entries) if !entries.is_empty() => {
                for (key, value) in entries {
                    text.push_str(&" ".repeat(indent));
                    text.push_str(&scalar(key));
                    text.push(':');
                    value.after_key(text, indent);
                }
            }
            Self::List(items) if !items.is_empty() => {
                for item in items {
                    text.push_str(&" ".repeat(indent));
                    text.push('-');
                    item.after_dash(text, indent);
                }
            }
            Self::Null | Self::Word(_) | Self::Text(_) | Self::List(_) | Self::Map(_) => {
                text.push_str(&self.inline());
                text.push('\n');
            }
        }
    }

    fn after_key(&self, text: &mut String, indent: usize) {
        if self.fits_inline() {
            text.push(' ');
            text.push_str(&self.inline());
            text.push('\n');
        } else {
            text.push('\n');
            self.block(text, indent + 2);
        }
    }

    fn after_dash(&self, text: &mut String, indent: usize) {
        if self.fits_inline() {
            text.push(' ');
            text.push_str(&self.inline());
            text.push('\n');
            return;
        }
        // The first line of the block goes behind the dash.
        let mut lines = String::new();
        self.block(&mut lines, indent + 2);
        text.push(' ');
        text.push_str(lines.trim_start_matches(' '));
    }

    /// Scalars, lists of scalars, and what is empty.
    fn fits_inline(&self) -> bool {
        match self {
            Self::Null | Self::Word(_) | Self::Text(_) => true,
            Self::List(items) => items.iter().all(Self::is_scalar),
            Self::Map(entries) => entries.is_empty(),
        }
    }

    fn is_scalar(&self) -> bool {
        match self {
            Self::Null | Self::Word(_) | Self::Text(_) => true,
            Self::List(_) | Self::Map(_) => false,
        }
    }

    fn inline(&self) -> String {
        match self {
            Self::Null => "null".to_owned(),
            Self::Word(word) => word.clone(),
            Self::Text(text) => scalar(text),
            Self::List(items) => {
                let items: Vec<_> = items.iter().map(Self::inline).collect();
                format!("[{}]", items.join(", "))
            }
            Self::Map(entries) => {
                let entry =
                    |(key, value): &(String, Self)| format!("{}: {}", scalar(key), value.inline());
                let entries: Vec<_> = entries.iter().map(entry).collect();
                format!("{{{}}}", entries.join(", "))
            }
        }
    }
}

/// Text that no YAML reader takes for anything else: plain where that is certain, else in double quotes.
fn scalar(text: &str) -> String {
    let first = text.bytes().next().is_some_and(|b| b.is_ascii_alphabetic() || b == b'/');
    let plain = text.bytes().all(|b| {
        b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.' | b'/' | b'+' | b'=' | b'@')
    });
    let reserved = matches!(
        text.to_ascii_lowercase().as_str(),
        "null" | "true" | "false" | "yes" | "no" | "on" | "off" | "y" | "n"
    );
    // `https://host:7070`: a colon is plain when no space follows, but not at the end or in a flow list.
    let address = text.contains("://")
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._/:".contains(&b));
    if first && !reserved && (plain || (address && !text.ends_with(':'))) {
        return text.to_owned();
    }
    // A JSON string is a YAML double-quoted scalar.
    serde_json::Value::from(text).to_string()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::prelude::*;

    use super::{
        super::{
            fault::Source,
            node::{Node, Value, parse},
        },
        *,
    };

    fn any_shown() -> impl Strategy<Value = Shown> {
        let leaf = prop_oneof![
            any::<String>().prop_map(Shown::Text),
            "[a-z:/#\\[\\], -]{0,9}".prop_map(Shown::Text)
        ];
        leaf.prop_recursive(4, 32, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Shown::List),
                prop::collection::btree_map(any::<String>(), inner, 0..4)
                    .prop_map(|map| Shown::Map(map.into_iter().collect())),
            ]
        })
    }

    fn same(shown: &Shown, node: &Node) -> bool {
        match (shown, &node.value) {
            (Shown::Text(text), Value::Scalar { text: read, .. }) => text == read,
            (Shown::List(items), Value::List(read)) => {
                items.len() == read.len() && items.iter().zip(read).all(|(a, b)| same(a, b))
            }
            (Shown::Map(entries), Value::Map(read)) => {
                entries.len() == read.len()
                    && entries.iter().zip(read).all(|(a, b)| a.0 == b.key && same(&a.1, &b.value))
            }
            _ => false,
        }
    }

    proptest! {
        #[test]
        fn what_is_written_reads_back_the_same(shown in any_shown()) {
            let document = Shown::map([("top", shown)]);
            let yaml = document.yaml();
            let mut faults = Vec::new();
            let node = parse(&yaml, &Source::File(Path::new("x").into()), &mut faults);
            prop_assert!(node.is_some_and(|node| same(&document, &node)), "{yaml}\n{faults:?}");
        }
    }
}
