//! What the traffic cost: bytes per path, and the price book.
//!
//! The one idea: bytes are added and stored, prices are applied to sums when somebody reads them, and rounding
//! happens once, at the end. Nothing here knows requests or connections, and nothing waits.

mod continent;
mod meter;
mod node;
mod prices;

pub use meter::{EgressBytes, Kind, Leg, Meter, Path, PathKey};
pub use prices::{PriceBook, PriceClass, PriceError, Rate, Site};
