//! What the system asks of the process.

use std::io;

use tokio::signal::unix::{SignalKind, signal};

/// What a signal means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// SIGTERM or SIGINT for the first time: end in order.
    Stop,
    /// SIGTERM or SIGINT again: end at once.
    StopAtOnce,
    /// SIGHUP: read the configuration again.
    Reload,
}

/// The signals of this process from now on. From the first call on they no longer end it by themselves.
#[derive(Debug)]
pub struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
    hangup: tokio::signal::unix::Signal,
    stopping: bool,
}

impl Signals {
    /// Begins to listen. Needs a runtime.
    ///
    /// # Errors
    /// What the system says when it refuses a handler.
    pub fn listen() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
            stopping: false,
        })
    }

    /// The next one. Cancel-safe.
    pub async fn next(&mut self) -> Signal {
        tokio::select! {
            _ = self.terminate.recv() => self.stop(),
            _ = self.interrupt.recv() => self.stop(),
            _ = self.hangup.recv() => Signal::Reload,
        }
    }

    fn stop(&mut self) -> Signal {
        if std::mem::replace(&mut self.stopping, true) { Signal::StopAtOnce } else { Signal::Stop }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn send(name: &str) {
        let me = std::process::id();
        let sent = Command::new("sh").arg("-c").arg(format!("kill -{name} {me}")).status().unwrap();
        assert!(sent.success());
    }

    #[tokio::test]
    async fn the_second_request_to_stop_means_at_once_and_hangup_means_reload() {
        let mut signals = Signals::listen().unwrap();
        send("HUP");
        assert_eq!(signals.next().await, Signal::Reload);
        send("TERM");
        assert_eq!(signals.next().await, Signal::Stop);
        send("INT");
        assert_eq!(signals.next().await, Signal::StopAtOnce);
    }
}
