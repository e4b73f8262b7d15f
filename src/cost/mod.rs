//! What the traffic cost: bytes per path and the price book.
