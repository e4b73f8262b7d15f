//! A value that one worker exchanges while it serves.

use std::{cell::RefCell, fmt, rc::Rc};

/// A value of one worker that is replaced whole. Whoever has read it keeps what it read: a request that began on the
/// old one ends on it. Reading costs a count on this thread alone.
pub(super) struct Live<T>(RefCell<Rc<T>>);

impl<T> Live<T> {
    /// The first value.
    #[must_use]
    pub(super) fn new(value: T) -> Self {
        Self(RefCell::new(Rc::new(value)))
    }

    /// The value in force.
    #[must_use]
    pub(super) fn now(&self) -> Rc<T> {
        Rc::clone(&self.0.borrow())
    }

    /// Puts another in force.
    pub(super) fn put(&self, value: T) {
        // Dropped after the borrow: what goes with the old value may read the new one.
        let _old = self.0.replace(Rc::new(value));
    }
}

impl<T: fmt::Debug> fmt::Debug for Live<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.borrow().fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_read_a_value_keeps_it() {
        let live = Live::new(1);
        let read = live.now();
        live.put(2);
        assert_eq!((*read, *live.now()), (1, 2));
    }
}
