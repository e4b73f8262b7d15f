//! One file per subcommand. Alone here may anything print or end the process.

mod ca;
mod check;
mod sample;
mod scene;
mod watch;
