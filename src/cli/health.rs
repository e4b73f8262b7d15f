//! `infrar health`: whether the proxy on this machine is ready, for images without curl.

use std::{net::SocketAddr, process::ExitCode, time::Duration};

use anyhow::Context;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use url::Url;

use super::{flags::listen, reach::tame};
use crate::config::defaults::ADMIN_LISTEN;

/// 0 when the proxy is ready.
#[derive(Debug, clap::Args)]
pub(crate) struct Health {
    /// The proxy's admin API [default: where INFRAR_ADMIN_LISTEN says, else http://127.0.0.1:15000].
    #[arg(long, env = "INFRAR_ADMIN_URL", value_name = "URL", value_parser = address)]
    admin: Option<Url>,
    /// The proxy's own setting, from the environment that a container's commands share.
    #[arg(long, env = "INFRAR_ADMIN_LISTEN", hide = true, value_parser = listen)]
    admin_listen: Option<SocketAddr>,
}

fn address(text: &str) -> Result<Url, String> {
    let url: Option<Url> = text.parse().ok();
    url.filter(|url| url.scheme() == "http" && url.has_host())
        .ok_or_else(|| "write http://HOST:PORT; the admin API speaks plain HTTP".to_owned())
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
        let at = self.admin()?;
        let host = at.host_str().context("--admin: write http://HOST:PORT")?;
        let port = at.port_or_known_default().context("--admin: write http://HOST:PORT")?;
        let answer =
            timeout(LIMIT, ask(host, port)).await.context("the proxy did not answer in time")?;
        let answer = answer.with_context(|| format!("the admin API at {at} cannot be reached"))?;
        if answer.starts_with("HTTP/1.1 200") {
            return Ok(ExitCode::SUCCESS);
        }
        eprintln!("infrar: {}", refused(&at, &answer));
        Ok(ExitCode::FAILURE)
    }

    fn admin(&self) -> anyhow::Result<Url> {
        match (&self.admin, self.admin_listen) {
            (Some(url), _) => Ok(url.clone()),
            (None, Some(listen)) => Ok(format!("http://{listen}").parse()?),
            (None, None) => Ok(format!("http://{ADMIN_LISTEN}").parse()?),
        }
    }
}

/// Why `answer` is none of a proxy that is ready. Of what others answer only the first line is shown.
fn refused(at: &Url, answer: &str) -> String {
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((answer, ""));
    let line: String = head.lines().next().unwrap_or_default().chars().take(60).collect();
    if line.starts_with("HTTP/1.1 503") && body.len() < 1024 {
        return format!("not ready: {}", tame(body.trim()));
    }
    format!("no infrar proxy answers at {at} (it said {:?})", line)
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

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Alone {
        #[command(flatten)]
        health: Health,
    }

    #[test]
    fn another_server_is_told_in_one_line() {
        let at: Url = "http://127.0.0.1:1".parse().unwrap();
        let page = format!("HTTP/1.1 404 Not Found\r\nserver: x\r\n\r\n<html>{}", "x".repeat(9999));
        let said = refused(&at, &page);
        assert_eq!(
            said,
            "no infrar proxy answers at http://127.0.0.1:1/ (it said \"HTTP/1.1 404 Not Found\")"
        );
        let waits = "HTTP/1.1 503 Service Unavailable\r\n\r\nno snapshot yet\n";
        assert_eq!(refused(&at, waits), "not ready: no snapshot yet");
    }

    #[test]
    fn it_asks_where_the_proxy_was_told_to_listen() {
        let asked = |words: &[&str]| {
            let words = ["health"].iter().chain(words);
            Alone::parse_from(words).health.admin().unwrap().to_string()
        };
        assert_eq!(asked(&[]), "http://127.0.0.1:15000/");
        assert_eq!(asked(&["--admin-listen", "[::1]:1"]), "http://[::1]:1/");
        let both = ["--admin-listen", "[::1]:1", "--admin", "http://localhost:2"];
        assert_eq!(asked(&both), "http://localhost:2/");
        // Nothing but plain HTTP would be understood.
        for wrong in ["https://127.0.0.1:15000", "127.0.0.1:15000", "http:"] {
            assert!(Alone::try_parse_from(["health", "--admin", wrong]).is_err(), "{wrong:?}");
        }
    }
}
