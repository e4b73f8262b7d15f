//! `infrar health`: whether the proxy on this machine is ready, for images without curl.

use std::{process::ExitCode, time::Duration};

use anyhow::Context;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use url::Url;

/// 0 when the proxy is ready.
#[derive(Debug, clap::Args)]
pub(crate) struct Health {
    /// The proxy's admin API.
    #[arg(long, env = "INFRAR_ADMIN_URL", default_value = "http://127.0.0.1:15000")]
    admin: Url,
}

/// A probe that takes longer has failed.
const LIMIT: Duration = Duration::from_secs(2);

impl Health {
    /// Asks `/readyz`.
    ///
    /// # Errors
    /// Whatever keeps it from an answer.
    #[expect(clippy::print_stderr, reason = "a command speaks to people")]
    pub(crate) async fn run(self) -> anyhow::Result<ExitCode> {
        let host = self.admin.host_str().context("--admin: write http://HOST:PORT")?;
        let port = self.admin.port_or_known_default().context("--admin: write http://HOST:PORT")?;
        let answer =
            timeout(LIMIT, ask(host, port)).await.context("the proxy did not answer in time")?;
        let answer =
            answer.with_context(|| format!("the admin API at {} cannot be reached", self.admin))?;
        if answer.starts_with("HTTP/1.1 200") {
            return Ok(ExitCode::SUCCESS);
        }
        let why = answer.split("\r\n\r\n").nth(1).unwrap_or_default().trim();
        eprintln!("infrar: not ready: {why}");
        Ok(ExitCode::FAILURE)
    }
}

async fn ask(host: &str, port: u16) -> std::io::Result<String> {
    let mut stream = TcpStream::connect((host.trim_matches(['[', ']']), port)).await?;
    let request =
        format!("GET /readyz HTTP/1.1\r\nhost: {host}:{port}\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    stream.take(64 * 1024).read_to_end(&mut answer).await?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}
