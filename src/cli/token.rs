//! `infrar token`: get one, look into one, check one.

use std::{
    fs,
    io::{Read, stdin},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, bail};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use jiff::Timestamp;
use secrecy::{ExposeSecret, SecretString};
use serde_json::{Value, json};
use url::Url;

use super::reach::{Reach, keys_url, print, tame};
use crate::{
    api::{CONTROL_AUDIENCE, Credential},
    identity::{Claims, Jwks, KeySet, MAX_TOKEN_BYTES, TokenFault, Trusted, Verifier},
    model::{ScopeSet, ServiceName},
    runtime::Clock,
};

/// The largest file with a secret or keys that is read.
const FILE_LIMIT: u64 = 1024 * 1024;

/// Tokens.
#[derive(Debug, clap::Args)]
pub struct Token {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    Get(Get),
    Inspect(Inspect),
    Verify(Verify),
}

impl Token {
    /// Does it; 1 when a token is not valid.
    ///
    /// # Errors
    /// Whatever keeps it from doing so.
    pub async fn run(self) -> anyhow::Result<ExitCode> {
        match self.verb {
            Verb::Get(get) => get.run().await,
            Verb::Inspect(inspect) => inspect.run(),
            Verb::Verify(verify) => verify.run().await,
        }
    }
}

/// Ask the control plane for a token and print it.
#[derive(Debug, clap::Args)]
struct Get {
    /// Who asks: a name of `identities`.
    #[arg(long, env = "INFRAR_SERVICE", value_name = "NAME")]
    client_id: ServiceName,
    /// The file with its secret; white space at its end is cut.
    #[arg(long, env = "INFRAR_CONTROL_CREDENTIAL_CLIENT_SECRET_FILE", value_name = "FILE")]
    client_secret_file: PathBuf,
    /// The service to be called; the default is the control plane itself.
    #[arg(long, default_value = CONTROL_AUDIENCE, value_name = "NAME")]
    audience: String,
    /// Only these scopes, with spaces between; the default is all that are granted.
    #[arg(long, value_parser = scopes, value_name = "SCOPES")]
    scope: Option<ScopeSet>,
    /// The whole answer as JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    reach: Reach,
}

fn scopes(text: &str) -> Result<ScopeSet, String> {
    ScopeSet::parse_list(text).map_err(|error| error.to_string())
}

impl Get {
    async fn run(self) -> anyhow::Result<ExitCode> {
        let secret = read_text(&self.client_secret_file)?;
        let secret = SecretString::from(secret.expose_secret().trim_end());
        if secret.expose_secret().is_empty() {
            bail!("{} is empty", self.client_secret_file.display());
        }
        let credential = Credential { client_id: self.client_id, secret };
        let client = self.reach.client()?;
        let answer = client.token(&credential, &self.audience, self.scope.as_ref()).await?;
        let token = answer.access_token.expose_secret();
        if self.json {
            let reply = json!({
                "access_token": token,
                "token_type": "Bearer",
                "expires_in": answer.expires_in.map(|life| life.as_secs()),
                "scope": answer.scope.to_string(),
            });
            print(&format!("{reply:#}"))?;
        } else {
            print(token)?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// Show what a token says; nothing of it is checked.
#[derive(Debug, clap::Args)]
struct Inspect {
    /// The token; `-` or nothing reads it from standard input, where no list of processes shows it.
    #[arg(hide_default_value = true, default_value = "-", value_name = "TOKEN")]
    token: SecretString,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

impl Inspect {
    #[expect(clippy::print_stderr, reason = "a command speaks to people")]
    fn run(self) -> anyhow::Result<ExitCode> {
        let token = given(self.token)?;
        let (header, claims) = decoded(token.expose_secret()).context(
            "that is no JWT: three base64url parts with dots between, the first two of them JSON objects",
        )?;
        if self.json {
            let all = json!({ "verified": false, "header": header, "claims": claims });
            print(&tame(&format!("{all:#}")))?;
        } else {
            eprintln!(
                "Not verified: anybody can write such a token. `infrar token verify` checks one."
            );
            print(&tame(&described(&header, &claims, Clock::system().now())))?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// The header and claims of a token, as they stand there.
fn decoded(token: &str) -> Option<(Value, Value)> {
    let mut parts = token.split('.');
    let mut part = || {
        let json = URL_SAFE_NO_PAD.decode(parts.next()?).ok()?;
        serde_json::from_slice(&json).ok().filter(Value::is_object)
    };
    let both = (part()?, part()?);
    // The signature; whatever it is.
    parts.next()?;
    parts.next().is_none().then_some(both)
}

/// Header and claims for people, with the moments written out.
fn described(header: &Value, claims: &Value, now: Timestamp) -> String {
    let mut text = format!("header {header:#}\nclaims {claims:#}");
    for (claim, meaning) in [("iat", "issued"), ("nbf", "valid from"), ("exp", "expires")] {
        let seconds = claims.get(claim).and_then(Value::as_i64);
        if let Some(moment) = seconds.and_then(|seconds| Timestamp::from_second(seconds).ok()) {
            let late = if claim == "exp" && moment <= now { " (it has expired)" } else { "" };
            text = format!("{text}\n{meaning}: {moment}{late}");
        }
    }
    text
}

/// Check a token as a callee does; 0 when it is valid, 1 with the reason when it is not.
#[derive(Debug, clap::Args)]
struct Verify {
    /// The token; `-` or nothing reads it from standard input, where no list of processes shows it.
    #[arg(hide_default_value = true, default_value = "-", value_name = "TOKEN")]
    token: SecretString,
    /// Whom it must be for.
    #[arg(long, value_name = "NAME")]
    audience: String,
    /// Who must have issued it [default: what --control says of itself].
    #[arg(long, value_name = "ISS")]
    issuer: Option<String>,
    /// Where the issuer's keys are [default: those of --control].
    #[arg(long, value_name = "URL", value_parser = keys_url, conflicts_with = "jwks_file", requires = "issuer")]
    jwks_uri: Option<Url>,
    /// A file with the issuer's keys.
    #[arg(long, value_name = "FILE", requires = "issuer")]
    jwks_file: Option<PathBuf>,
    /// As JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    reach: Reach,
}

impl Verify {
    async fn run(self) -> anyhow::Result<ExitCode> {
        let token = given(self.token.clone())?;
        let issuer = match &self.issuer {
            Some(issuer) => issuer.clone(),
            None => self.reach.client()?.own_issuer().await?,
        };
        let keys = KeySet::from_json(&self.keys().await?)
            .with_context(|| format!("the keys of {issuer} cannot be used"))?;
        let trusted = Trusted {
            issuer: issuer.as_str().into(),
            // Of another issuer's tokens less is asked: `at+jwt` is ours.
            ours: self.jwks_uri.is_none() && self.jwks_file.is_none(),
            audiences: Vec::new(),
            keys: Jwks::fixed(issuer.as_str().into(), keys),
        };
        let verdict = Verifier::new(vec![trusted]).verify(
            token.expose_secret().as_bytes(),
            &[&self.audience],
            Clock::system().unix_seconds(),
        );
        let said =
            decoded(token.expose_secret()).and_then(|(_, claims)| claims.get("iss").cloned());
        self.report(&verdict, &issuer, said.as_ref().and_then(Value::as_str))
    }

    async fn keys(&self) -> anyhow::Result<Value> {
        if let Some(path) = &self.jwks_file {
            let text = read_text(path)?;
            let keys = serde_json::from_str(text.expose_secret());
            return keys.with_context(|| format!("{} is no JSON", path.display()));
        }
        let client = self.reach.client()?;
        let keys = match &self.jwks_uri {
            Some(url) => client.jwks(url).await,
            None => client.own_jwks().await,
        };
        keys.context("the issuer's keys cannot be had")
    }

    #[expect(clippy::print_stderr, reason = "a command speaks to people")]
    fn report(
        &self,
        verdict: &Result<Claims, TokenFault>,
        issuer: &str,
        said: Option<&str>,
    ) -> anyhow::Result<ExitCode> {
        let (answer, text, code) = match verdict {
            Ok(claims) => {
                let expires = Timestamp::from_second(claims.expires_at()).unwrap_or(Timestamp::MAX);
                let caller = claims.caller().as_str();
                let scopes = claims.scopes().to_string();
                let answer = json!({
                    "valid": true,
                    "issuer": claims.issuer(),
                    "caller": caller,
                    "audience": self.audience,
                    "scopes": claims.scopes(),
                    "expires": expires,
                });
                let may = if scopes.is_empty() { "no scopes".to_owned() } else { scopes };
                let mut text =
                    format!("valid: {caller} at {} with {may}, until {expires}", self.audience);
                let address = self.reach.address();
                if self.issuer.is_none() && address != issuer {
                    text = format!("{text}\nissued by {issuer}, which was asked at {address}");
                }
                (answer, text, ExitCode::SUCCESS)
            }
            Err(fault) => {
                let answer = json!({
                    "valid": false,
                    "fault": fault.label(),
                    "reason": fault.to_string(),
                    "issuer": issuer,
                    "token_issuer": said,
                });
                let mut text = format!("not valid: {fault}");
                if let Some(said) = said.filter(|said| *said != issuer) {
                    text = format!("{text}\nthe token's issuer is {said}, asked for was {issuer}");
                }
                (answer, text, ExitCode::FAILURE)
            }
        };
        if self.json {
            print(&tame(&format!("{answer:#}")))?;
        } else if verdict.is_ok() {
            print(&tame(&text))?;
        } else {
            eprintln!("{}", tame(&text));
        }
        Ok(code)
    }
}

/// The token of the command line, or the one on standard input.
fn given(argument: SecretString) -> anyhow::Result<SecretString> {
    if argument.expose_secret() != "-" {
        return Ok(argument);
    }
    let mut text = String::new();
    // A little more than is ever looked at, so that a longer one is refused and not cut.
    let limit = u64::try_from(MAX_TOKEN_BYTES)?.saturating_mul(4);
    stdin().take(limit).read_to_string(&mut text).context("no token on standard input")?;
    Ok(SecretString::from(text.trim()))
}

/// A small text file that may hold a secret.
fn read_text(path: &Path) -> anyhow::Result<SecretString> {
    let unreadable = || format!("{} cannot be read", path.display());
    let mut text = String::new();
    let file = fs::File::open(path).with_context(unreadable)?;
    file.take(FILE_LIMIT).read_to_string(&mut text).with_context(unreadable)?;
    Ok(SecretString::from(text))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::identity::{Mint, MintSettings};

    #[derive(Debug, Parser)]
    struct Alone {
        #[command(flatten)]
        token: Token,
    }

    const ISSUER: &str = "https://control.example";

    /// A token for `reports` in a file's stead, and the file with its keys.
    fn minted(folder: &Path) -> (String, PathBuf) {
        let now = Clock::system().now();
        let mint = Mint::open(MintSettings::new(folder.join("keys")), now).unwrap();
        let keys = folder.join("jwks.json");
        fs::write(&keys, serde_json::to_vec(&mint.jwks(now)).unwrap()).unwrap();
        let caller = "web-application".parse().unwrap();
        let scopes = ScopeSet::parse_list("read:data").unwrap();
        let token = mint.sign(ISSUER, &caller, "reports", &scopes, now).unwrap().token;
        (token.expose_secret().to_owned(), keys)
    }

    async fn verify(token: &str, audience: &str, keys: &Path) -> ExitCode {
        let keys = keys.to_str().unwrap();
        let words = ["token", "verify", token, "--audience", audience, "--issuer", ISSUER];
        let words = words.into_iter().chain(["--jwks-file", keys, "--json"]);
        Alone::try_parse_from(words).unwrap().token.run().await.unwrap()
    }

    #[tokio::test]
    async fn a_valid_token_is_0_and_any_other_is_1() {
        let folder = tempfile::tempdir().unwrap();
        let (token, keys) = minted(folder.path());
        assert_eq!(verify(&token, "reports", &keys).await, ExitCode::SUCCESS);
        assert_eq!(verify(&token, "other", &keys).await, ExitCode::FAILURE);
        assert_eq!(verify("a.b.c", "reports", &keys).await, ExitCode::FAILURE);
    }

    #[test]
    fn inspecting_shows_the_claims_and_when_they_end() {
        let folder = tempfile::tempdir().unwrap();
        let (token, _) = minted(folder.path());
        let (header, claims) = decoded(&token).unwrap();
        assert_eq!(header["typ"], "at+jwt");
        assert_eq!(claims["aud"], "reports");
        let far = Timestamp::MAX;
        assert!(described(&header, &claims, far).contains("it has expired"));
        for bad in ["", "a.b", "a.b.c", "e30.e30", "e30.e30.x.y", "W10.e30.x"] {
            assert!(decoded(bad).is_none(), "{bad:?}");
        }
        // Other people's algorithms are shown all the same.
        assert!(decoded("eyJhbGciOiJub25lIn0.e30.").is_some());
    }

    #[test]
    fn keys_of_another_place_need_the_issuer_they_belong_to() {
        let words = ["token", "verify", "x", "--audience", "a", "--jwks-uri", "https://i/jwks"];
        assert!(Alone::try_parse_from(words).is_err());
    }

    #[test]
    fn a_token_on_the_command_line_is_not_printed_by_debug() {
        let parsed = Alone::try_parse_from(["token", "inspect", "a.secret.token"]).unwrap();
        assert!(!format!("{parsed:?}").contains("secret.token"));
    }
}
