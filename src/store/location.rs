//! Where a store is, as an operator writes it. A password in it is never shown.

use std::{
    fmt::{self, Write as _},
    path::{Path, PathBuf},
    str::FromStr,
};

use tokio_postgres::config::{Host, SslMode};

/// The schema that is made and used when the URL's options name no `search_path`.
const OWN_SCHEMA: &str = "infrar";

/// What the URL may say besides, in libpq's words.
const PARAMETERS: [&str; 19] = [
    "user",
    "password",
    "dbname",
    "options",
    "application_name",
    "sslmode",
    "sslrootcert",
    "sslnegotiation",
    "host",
    "hostaddr",
    "port",
    "connect_timeout",
    "tcp_user_timeout",
    "keepalives",
    "keepalives_idle",
    "keepalives_interval",
    "keepalives_retries",
    "target_session_attrs",
    "channel_binding",
];

/// Where a store is.
#[derive(Clone)]
pub enum Location {
    /// A file of one process.
    Sqlite(PathBuf),
    /// A database that many share.
    Postgres(Box<Database>),
}

/// A PostgreSQL database and how to get there.
#[derive(Clone)]
pub struct Database {
    pub(super) config: tokio_postgres::Config,
    pub(super) trust: Trust,
    pub(super) root_certificates: Option<PathBuf>,
    /// The schema that is ours to make, when the operator chose none.
    pub(super) own_schema: Option<&'static str>,
}

/// What is asked of the server's certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trust {
    /// Nothing: whatever is encrypted is encrypted for whoever answered.
    Anybody,
    /// That it was issued to the host we called, by somebody we believe.
    Verified,
}

/// Why a text names no store, and what to write.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LocationError {
    /// Nothing was written.
    #[error("no store is named; write sqlite:PATH or postgres://USER:PASSWORD@HOST/DATABASE")]
    Empty,
    /// Neither of the two.
    #[error(
        "{scheme:?} is no kind of store; write sqlite:PATH or postgres://USER:PASSWORD@HOST/DATABASE"
    )]
    UnknownKind {
        /// What was written before the colon.
        scheme: String,
    },
    /// Not to be read as the URL of a database. The text is not repeated: a password may be in it.
    #[error(
        "this is no URL of a PostgreSQL database; write postgres://USER:PASSWORD@HOST:5432/DATABASE?sslmode=verify-full, \
         with what is special in the password as %40"
    )]
    NotAUrl,
    /// It names no server.
    #[error("the URL names no server; write postgres://USER:PASSWORD@HOST/DATABASE")]
    NoHost,
    /// A key that PostgreSQL's URLs do not have.
    #[error("{key:?} is no parameter of such a URL; there are {}", PARAMETERS.join(", "))]
    UnknownParameter {
        /// As it was written.
        key: String,
    },
    /// Another word after `sslmode=`.
    #[error("sslmode is {found:?}; write disable, prefer, require or verify-full")]
    UnknownSslMode {
        /// As it was written.
        found: String,
    },
    /// A CA that would never be asked.
    #[error(
        "sslrootcert is of use with sslmode=verify-full only; write that, or leave sslrootcert out"
    )]
    UselessRootCertificate,
}

impl FromStr for Location {
    type Err = LocationError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let text = text.trim();
        if text.starts_with("postgres://") || text.starts_with("postgresql://") {
            return Database::parse(text).map(|database| Self::Postgres(Box::new(database)));
        }
        let path = match text.split_once(':') {
            Some(("sqlite", rest)) => rest.strip_prefix("//").unwrap_or(rest),
            Some((scheme, rest)) if rest.starts_with("//") || scheme.starts_with("postgres") => {
                return Err(LocationError::UnknownKind { scheme: scheme.to_owned() });
            }
            _ => text,
        };
        if path.is_empty() {
            return Err(LocationError::Empty);
        }
        Ok(Self::Sqlite(PathBuf::from(path)))
    }
}

impl From<&Path> for Location {
    fn from(path: &Path) -> Self {
        Self::Sqlite(path.to_owned())
    }
}

impl Database {
    fn parse(text: &str) -> Result<Self, LocationError> {
        let (head, query) = text.split_once('?').unwrap_or((text, ""));
        // An `@` behind the `?` is the end of a password that has a `?` in it.
        if query.contains('@') && !head.contains('@') {
            return Err(LocationError::NotAUrl);
        }
        let mut kept = Vec::new();
        let (mut ssl_mode, mut root_certificates) = (None, None);
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').ok_or(LocationError::NotAUrl)?;
            match key {
                "sslmode" => ssl_mode = Some(value),
                "sslrootcert" => root_certificates = Some(PathBuf::from(decoded(value))),
                known if PARAMETERS.contains(&known) => kept.push(pair),
                // Half a password may have ended up here; a word of letters is hardly one.
                word if word.chars().all(|c| c.is_ascii_lowercase() || c == '_') => {
                    return Err(LocationError::UnknownParameter { key: word.to_owned() });
                }
                _ => return Err(LocationError::NotAUrl),
            }
        }
        let url =
            if kept.is_empty() { head.to_owned() } else { format!("{head}?{}", kept.join("&")) };
        // What the parser says may repeat the text.
        #[expect(clippy::map_err_ignore, reason = "its words may repeat half a password")]
        let mut config: tokio_postgres::Config = url.parse().map_err(|_| LocationError::NotAUrl)?;
        if config.get_hosts().is_empty() && config.get_hostaddrs().is_empty() {
            return Err(LocationError::NoHost);
        }
        let (mode, trust) = tls(ssl_mode, &config)?;
        if root_certificates.is_some() && trust == Trust::Anybody {
            return Err(LocationError::UselessRootCertificate);
        }
        config.ssl_mode(mode);
        let chosen = config.get_options().is_some_and(|options| options.contains("search_path"));
        Ok(Self { config, trust, root_certificates, own_schema: (!chosen).then_some(OWN_SCHEMA) })
    }
}

/// Without a word about it, a server on this machine may speak in the clear, and any other must prove who it is.
fn tls(
    written: Option<&str>,
    config: &tokio_postgres::Config,
) -> Result<(SslMode, Trust), LocationError> {
    match written {
        Some("disable") => Ok((SslMode::Disable, Trust::Anybody)),
        Some("prefer") => Ok((SslMode::Prefer, Trust::Anybody)),
        Some("require") => Ok((SslMode::Require, Trust::Anybody)),
        Some("verify-full") => Ok((SslMode::Require, Trust::Verified)),
        Some(found) => Err(LocationError::UnknownSslMode { found: found.to_owned() }),
        None if is_here(config) => Ok((SslMode::Prefer, Trust::Anybody)),
        None => Ok((SslMode::Require, Trust::Verified)),
    }
}

fn is_here(config: &tokio_postgres::Config) -> bool {
    let addresses = config.get_hostaddrs();
    if !addresses.is_empty() {
        return addresses.iter().all(std::net::IpAddr::is_loopback);
    }
    config.get_hosts().iter().all(|host| match host {
        Host::Unix(_) => true,
        Host::Tcp(name) => {
            name == "localhost"
                || name.parse().is_ok_and(|address: std::net::IpAddr| address.is_loopback())
        }
    })
}

/// `%2F` → `/`; what is no escape stays.
fn decoded(text: &str) -> String {
    let spaced = text.replace('+', "%2B");
    url::form_urlencoded::parse(format!("v={spaced}").as_bytes())
        .next()
        .map(|(_, value)| value.into_owned())
        .unwrap_or_default()
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sqlite(path) => write!(f, "sqlite:{}", path.display()),
            Self::Postgres(database) => database.fmt(f),
        }
    }
}

impl fmt::Debug for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("postgres://")?;
        if let Some(user) = self.config.get_user() {
            write!(f, "{user}@")?;
        }
        let ports = self.config.get_ports();
        let names = self.config.get_hosts().iter().map(|host| match host {
            Host::Tcp(name) => name.clone(),
            Host::Unix(path) => path.display().to_string(),
        });
        let addresses = self.config.get_hostaddrs().iter().map(ToString::to_string);
        let hosts: Vec<String> =
            if self.config.get_hosts().is_empty() { addresses.collect() } else { names.collect() };
        for (at, host) in hosts.iter().enumerate() {
            let comma = if at == 0 { "" } else { "," };
            let port = ports.get(at).or_else(|| ports.first()).copied().unwrap_or(5432);
            write!(f, "{comma}{host}:{port}")?;
        }
        match self.config.get_dbname() {
            Some(name) => write!(f, "/{name}"),
            None => f.write_char('/'),
        }
    }
}

impl fmt::Debug for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn database(text: &str) -> Database {
        match text.parse() {
            Ok(Location::Postgres(database)) => *database,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_path_is_a_file_with_or_without_its_kind() {
        for text in [
            "/var/lib/infrar/store.db",
            "sqlite:/var/lib/infrar/store.db",
            "sqlite:///var/lib/infrar/store.db",
        ] {
            let location: Location = text.parse().unwrap();
            assert_eq!(location.to_string(), "sqlite:/var/lib/infrar/store.db");
        }
    }

    #[test]
    fn a_url_is_a_database_and_its_password_stays_out_of_sight() {
        let text = "postgres://infrar:s%40cret@db.example:6432/shop?sslmode=verify-full&sslrootcert=%2Fetc%2Fca.pem&password=other";
        let location: Location = text.parse().unwrap();
        assert_eq!(location.to_string(), "postgres://infrar@db.example:6432/shop");
        assert_eq!(format!("{location:?}"), location.to_string());
        let database = database(text);
        assert_eq!(database.root_certificates, Some(PathBuf::from("/etc/ca.pem")));
        assert_eq!(database.own_schema, Some("infrar"));
    }

    #[test]
    fn only_a_server_on_this_machine_may_speak_in_the_clear_unasked() {
        let trust = |text| database(text).trust;
        assert_eq!(trust("postgres://u@127.0.0.1/d"), Trust::Anybody);
        assert_eq!(trust("postgres://u@%2Frun%2Fpostgresql/d"), Trust::Anybody);
        assert_eq!(trust("postgres://u@db.example/d"), Trust::Verified);
        assert_eq!(trust("postgres://u@db.example/d?sslmode=require"), Trust::Anybody);
    }

    #[test]
    fn a_schema_is_chosen_by_search_path() {
        let chosen = database("postgres://u@localhost/d?options=-c%20search_path%3Dours");
        assert_eq!(chosen.own_schema, None);
    }

    #[test]
    fn what_names_no_store_is_told_what_to_write() {
        let fault = |text: &str| text.parse::<Location>().unwrap_err();
        assert_eq!(fault(" "), LocationError::Empty);
        assert_eq!(fault("sqlite:"), LocationError::Empty);
        assert_eq!(
            fault("mysql://root@db/x"),
            LocationError::UnknownKind { scheme: "mysql".into() }
        );
        assert_eq!(fault("postgres:db"), LocationError::UnknownKind { scheme: "postgres".into() });
        assert_eq!(fault("postgres:///x"), LocationError::NoHost);
        let found = "verify-ca".to_owned();
        assert_eq!(
            fault("postgres://db/x?sslmode=verify-ca"),
            LocationError::UnknownSslMode { found }
        );
        let key = "sslmod".to_owned();
        assert_eq!(
            fault("postgres://db/x?sslmod=disable"),
            LocationError::UnknownParameter { key }
        );
        assert_eq!(
            fault("postgres://db/x?sslmode=require&sslrootcert=/ca.pem"),
            LocationError::UselessRootCertificate
        );
    }

    #[test]
    fn a_password_that_breaks_the_url_is_not_repeated() {
        for text in [
            "postgres://u:s3/cret@db/x",
            "postgres://u:s3?cret=4@db/x",
            "postgres://u:s3cret:9@db:x/y",
        ] {
            let fault = match text.parse::<Location>() {
                Err(fault) => fault.to_string(),
                Ok(location) => location.to_string(),
            };
            assert!(!fault.contains("s3") && !fault.contains("cret"), "{fault}");
        }
    }
}
