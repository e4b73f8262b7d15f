//! One file per subcommand. Alone here may anything print or end the process.

mod ca;
mod sample;
mod scene;
mod watch;
