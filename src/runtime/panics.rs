//! What becomes of a panic: one line in the log, one more in the count. Whatever panicked ends; the process lives.

use std::{
    any::Any,
    cell::Cell,
    panic::PanicHookInfo,
    sync::atomic::{AtomicU64, Ordering},
    thread,
};

/// So much of a panic's own text is logged.
const MOST_TEXT: usize = 300;

static PANICS: AtomicU64 = AtomicU64::new(0);

thread_local! {
    /// The hook is at work: a panic of the log itself must not come back here.
    static REPORTING: Cell<bool> = const { Cell::new(false) };
    /// The hook has reported a panic that nobody on this thread has caught yet.
    static REPORTED: Cell<bool> = const { Cell::new(false) };
}

/// How many panics there were in this process. Zero, unless there is a bug to be found.
#[must_use]
pub fn panics() -> u64 {
    PANICS.load(Ordering::Relaxed)
}

/// Has every panic from now on, in whatever thread or task, logged as one line and counted. Called once, when the log
/// has started.
pub fn report_panics() {
    std::panic::set_hook(Box::new(|info| {
        if REPORTING.replace(true) {
            return;
        }
        PANICS.fetch_add(1, Ordering::Relaxed);
        REPORTED.set(true);
        report(info);
        REPORTING.set(false);
    }));
}

fn report(info: &PanicHookInfo<'_>) {
    let place = info.location().map(ToString::to_string).unwrap_or_default();
    let current = thread::current();
    let thread = current.name().unwrap_or_default();
    let panic = harmless(text(info.payload()));
    tracing::error!(
        place,
        thread,
        panic,
        "a panic, which is a bug: what panicked has ended, the others go on"
    );
}

/// A task was caught panicking. Where the hook is installed it has said and counted that already; this says which task.
pub(super) fn caught(task: &str) {
    if REPORTED.take() {
        return tracing::debug!(task, "it was this task that panicked");
    }
    PANICS.fetch_add(1, Ordering::Relaxed);
    tracing::error!(task, "a task panicked; the others go on");
}

fn text(payload: &(dyn Any + Send)) -> &str {
    let owned = payload.downcast_ref::<String>().map(String::as_str);
    owned.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("(no text)")
}

/// The text of a panic on one line, without what it may quote of the values at hand: a slice of a string says the
/// string, an `unwrap` the error. Either could hold what somebody sent, and that could be a secret.
fn harmless(text: &str) -> String {
    let mut told = String::new();
    let mut within = None;
    let mut before = ' ';
    for c in text.chars().take(MOST_TEXT) {
        match within {
            None if c == '"' || c == '`' => {
                told.push(c);
                within = Some(c);
            }
            None => told.extend(c.escape_debug()),
            Some(quote) if c == quote && before != '\\' => {
                told.push('…');
                told.push(c);
                within = None;
            }
            Some(_) => {}
        }
        before = c;
    }
    if within.is_some() {
        told.push('…');
    }
    told
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_a_panic_quotes_is_not_told() {
        let secret = "Bearer abc";
        for (text, told) in [
            ("on purpose", "on purpose"),
            ("two\nlines", "two\\nlines"),
            (
                "byte index 3 is out of bounds of `Bearer abc`",
                "byte index 3 is out of bounds of `…`",
            ),
            ("it broke: Fault { text: \"Bearer \\\" abc\" }", "it broke: Fault { text: \"…\" }"),
            ("cut off: \"Bearer abc", "cut off: \"…"),
        ] {
            assert_eq!(harmless(text), told);
            assert!(!harmless(text).contains(secret));
        }
        assert!(harmless(&"x".repeat(10_000)).len() <= MOST_TEXT);
    }

    proptest! {
        #[test]
        fn a_line_stays_one_and_a_quoted_word_is_gone(before in "[a-z ]{0,9}", word in "[A-Z]{1,9}", text in any::<String>()) {
            let told = harmless(&format!("{before}\"{word}\" {text}"));
            prop_assert!(!told.contains(char::is_control));
            prop_assert!(told.starts_with(&format!("{before}\"…\"")), "{told}");
        }
    }
}
