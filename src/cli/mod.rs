//! The commands: one file per subcommand; alone may print or exit.

mod ca;
mod sample;
