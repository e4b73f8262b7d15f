//! One file per subcommand. Alone here may anything print or end the process.

mod backup;
mod ca;
mod check;
pub mod completions;
mod control;
mod demo;
mod flags;
mod health;
mod kept;
mod metrics;
mod project;
mod proxies;
mod proxy;
mod reach;
mod registering;
mod reload;
mod sample;
mod scene;
pub mod services;
mod settings;
pub mod token;
mod trust;
mod up;
mod watch;
mod world;

use std::{borrow::Cow, process::ExitCode};

use anyhow::Context;
use clap::{CommandFactory, Parser, Subcommand};

use crate::{
    api::ClientError,
    config::Faults,
    control::ControlError,
    net,
    proxy::StartError,
    runtime::{Side, Supervisor, report_panics},
    store::StoreError,
    telemetry::{self, Format, LogError},
};

/// Flags that every command has, apart from its own.
const LOG: &str = "Log";

/// A proxy beside each service, an edge in each cloud, and the small control plane they share.
#[derive(Debug, Parser)]
#[command(name = "infrar", version, about, propagate_version = true)]
struct Cli {
    /// The form of log lines: auto (text on a terminal, else json), text or json.
    #[arg(long, global = true, env = "INFRAR_LOG_FORMAT", value_parser = log_format, help_heading = LOG)]
    log_format: Option<Format>,
    /// How much is logged: error, warn, info, debug or trace, or directives.
    #[arg(long, global = true, env = "INFRAR_LOG_LEVEL", help_heading = LOG)]
    log_level: Option<String>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Up(up::Up),
    /// Three simulated clouds with sidecars and sample services in one process, live traffic.
    Demo,
    Proxy(proxy::Proxy),
    Control(control::ControlArgs),
    Check(check::Check),
    Health(health::Health),
    Services(services::Services),
    Project(project::Project),
    Proxies(proxies::Proxies),
    Backup(backup::Backup),
    Restore(backup::Restore),
    Token(token::Token),
    Completions(completions::Completions),
    Man(completions::Man),
}

impl Cli {
    /// The form of all lines, those about the process and those about requests: what the flag says, else the
    /// environment, else the settings of the proxy that is to run.
    fn format(&mut self) -> Format {
        match &mut self.command {
            Command::Proxy(proxy) => {
                proxy.flags.log_format = self.log_format;
                proxy.flags.resolved_log_format()
            }
            Command::Up(up) => {
                up.log_format = self.log_format;
                self.log_format.unwrap_or_default()
            }
            Command::Demo
            | Command::Control(_)
            | Command::Check(_)
            | Command::Health(_)
            | Command::Services(_)
            | Command::Project(_)
            | Command::Proxies(_)
            | Command::Backup(_)
            | Command::Restore(_)
            | Command::Token(_)
            | Command::Completions(_)
            | Command::Man(_) => self.log_format.unwrap_or_default(),
        }
    }
}

/// The command line lacks something; says what to write.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Usage(Cow<'static, str>);

impl Usage {
    fn new(text: impl Into<Cow<'static, str>>) -> Self {
        Self(text.into())
    }
}

fn log_format(text: &str) -> Result<Format, String> {
    match text {
        "auto" => Ok(Format::Auto),
        "text" => Ok(Format::Text),
        "json" => Ok(Format::Json),
        _ => Err("write auto, text or json".to_owned()),
    }
}

/// Reads the command line and runs one command; the exit code is 0 when it is done, 1 when it failed, 2 for wrong usage
/// or configuration.
#[must_use]
pub fn main() -> ExitCode {
    net::install_provider();
    let mut cli = Cli::parse();
    let format = cli.format();
    let quiet = matches!(cli.command, Command::Demo);
    let level = cli.log_level.as_deref().unwrap_or(if quiet { "warn" } else { "info" });
    let log = telemetry::start(format, level).context("--log-level or INFRAR_LOG_LEVEL");
    let log = match log {
        Ok(log) => log,
        Err(error) => return fail(&error),
    };
    report_panics();
    let side = match Side::start() {
        Ok(side) => side,
        Err(error) => return fail(&error.into()),
    };
    let outcome = side.block_on(run(cli.command));
    drop(side);
    drop(log);
    match outcome {
        Ok(code) => code,
        Err(error) => fail(&error),
    }
}

async fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Up(up) => up.run().await?,
        Command::Demo => {
            let supervisor = Supervisor::new(tokio::runtime::Handle::current());
            demo::run(&supervisor).await?;
        }
        Command::Proxy(proxy) => proxy.run().await?,
        Command::Control(control) => control.run().await?,
        Command::Check(check) => return Ok(check.run()),
        Command::Health(health) => return health.run().await,
        Command::Services(services) => services.run().await?,
        Command::Project(project) => project.run().await?,
        Command::Proxies(proxies) => proxies.run().await?,
        Command::Backup(backup) => backup.run().await?,
        Command::Restore(restore) => restore.run().await?,
        Command::Token(token) => return token.run().await,
        Command::Completions(completions) => completions.run(Cli::command())?,
        Command::Man(man) => man.run(Cli::command())?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Says what went wrong, and whose it was.
#[expect(clippy::print_stderr, reason = "this is where commands speak to people")]
fn fail(error: &anyhow::Error) -> ExitCode {
    eprintln!("infrar: {error:#}");
    let configuration = error.chain().any(|cause| {
        cause.is::<Faults>()
            || cause.downcast_ref::<ControlError>().is_some_and(ControlError::is_configuration)
            || matches!(cause.downcast_ref(), Some(ClientError::Settings { .. }))
            || cause.is::<net::BindError>()
            || cause.is::<net::BindErrors>()
            || matches!(cause.downcast_ref(), Some(LogError::Level(_)))
            || cause.downcast_ref::<StoreError>().is_some_and(|error| !error.is_temporary())
            || cause.is::<Usage>()
            || cause.is::<StartError>()
            || cause.is::<net::TlsError>()
    });
    if configuration { ExitCode::from(2) } else { ExitCode::FAILURE }
}
