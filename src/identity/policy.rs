//! Claims × action → Grant.
//!
//! A [`Grant`] is the proof that somebody may do something; only this file can build one, so without it there
//! is no forwarding. Everything is denied that nobody granted: a caller without a row in `permissions`, a path
//! that no rule names, and a path that two servers would read differently.
//!
//! Paths are compared, never rewritten: what the application receives is what the caller sent.

use std::{borrow::Cow, str::FromStr};

use http::{HeaderValue, Method};

use crate::{
    identity::claims::{Caller, Claims},
    model::{Enforcement, Project, ScopeSet, ServiceName},
};

/// Proof that somebody may do something. Only [`permits`], [`admit`], [`Action::open`] and [`outside`] build one.
#[derive(Clone, Debug)]
pub struct Grant {
    scopes: Option<HeaderValue>,
    learned: bool,
}

impl Grant {
    /// What counts of the caller's scopes, space separated: the value of `infrar-scopes`. `None` where nobody
    /// was asked who it is (a public path), and on the way out.
    #[must_use]
    pub fn scopes(&self) -> Option<&HeaderValue> {
        self.scopes.as_ref()
    }

    /// Whether it exists only because the project is still learning: worth a report.
    #[must_use]
    pub fn is_learned(&self) -> bool {
        self.learned
    }
}

/// Whether a missing grant refuses right now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strictness {
    /// It refuses.
    Enforce,
    /// It is let through, and the grant says so.
    Learn,
}

impl Strictness {
    /// What the project's mode means at `now`.
    #[must_use]
    pub fn at(mode: &Enforcement, now: jiff::Timestamp) -> Self {
        match mode {
            Enforcement::LearnUntil(end) if now < *end => Self::Learn,
            Enforcement::LearnUntil(_) | Enforcement::Enforce => Self::Enforce,
        }
    }
}

/// No row of `permissions` lets this caller speak to this callee.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{caller} has no grant at {callee}")]
pub struct NotPermitted {
    /// Who would speak.
    pub caller: ServiceName,
    /// To whom.
    pub callee: ServiceName,
}

/// May `caller` speak to `callee` at all? The question of the way out.
///
/// # Errors
/// [`NotPermitted`] when `permissions` has no such row and the project does not learn.
pub fn permits(
    project: &Project,
    caller: &ServiceName,
    callee: &ServiceName,
    strictness: Strictness,
) -> Result<Grant, NotPermitted> {
    match (project.granted(caller, callee), strictness) {
        (Some(_scopes), _) => Ok(Grant { scopes: None, learned: false }),
        (None, Strictness::Learn) => Ok(Grant { scopes: None, learned: true }),
        (None, Strictness::Enforce) => {
            Err(NotPermitted { caller: caller.clone(), callee: callee.clone() })
        }
    }
}

/// May this proxy's service speak to hosts outside the project? `permissions` says nothing about those; whoever has
/// asked the proxy's own settings gets the grant here.
#[must_use]
pub fn outside() -> Grant {
    Grant { scopes: None, learned: false }
}

/// Why a request with a valid token goes no further.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// `permissions` gives the caller nothing here (any more).
    #[error("{caller} has no grant here")]
    NotPermitted {
        /// Who it is.
        caller: String,
    },
    /// The action needs scopes that the caller lacks.
    #[error("{caller} lacks the scope {missing}")]
    ScopeMissing {
        /// Who it is.
        caller: String,
        /// What it lacks; empty when any one scope would have done.
        missing: ScopeSet,
    },
    /// There are rules and none names this method and path.
    #[error("no rule names this method and path")]
    Unlisted,
    /// The path cannot be compared.
    #[error("the path cannot be compared with the rules")]
    Path(#[source] PathFault),
}

/// May the bearer of `claims` do `action`? The question of the way in.
///
/// `granted_now` is what `permissions` gives the caller at this callee in the present snapshot. Scopes of our
/// own issuer's tokens count only while they are in it; for other issuers the token's own count and
/// `granted_now` is not looked at. Another issuer may put any word into `scope`, so where any scope will do, its token
/// needs one of those that the service has, `listed`, as far as they are known.
///
/// # Errors
/// [`Refused`], never by `strictness` alone when the path is unlisted or unclear.
pub fn admit(
    claims: &Claims,
    action: Action<'_>,
    granted_now: Option<&ScopeSet>,
    listed: Option<&ScopeSet>,
    strictness: Strictness,
) -> Result<Grant, Refused> {
    let needed = match action {
        Action::Unlisted => return Err(Refused::Unlisted),
        Action::Unclear(fault) => return Err(Refused::Path(fault)),
        Action::Public => Needed::Nothing,
        Action::AnyScope => Needed::AnyScope,
        Action::Scopes(scopes) if scopes.is_empty() => Needed::Nothing,
        Action::Scopes(scopes) => Needed::All(scopes),
    };
    let (held, header) = holding(claims, granted_now);
    let missing = match needed {
        Needed::Nothing => None,
        Needed::AnyScope => {
            let counts = |scope| match listed {
                Some(listed) if !claims.is_ours() => listed.contains(scope),
                Some(_) | None => true,
            };
            (!held.iter().any(counts)).then(ScopeSet::default)
        }
        Needed::All(scopes) if held.covers(scopes) => None,
        Needed::All(scopes) => {
            Some(scopes.iter().filter(|scope| !held.contains(scope)).cloned().collect())
        }
    };
    let Some(missing) = missing else {
        return Ok(Grant { scopes: Some(header), learned: false });
    };
    // Learning is about rows of `permissions`; another issuer's token never depended on them.
    if strictness == Strictness::Learn && claims.is_ours() {
        return Ok(Grant { scopes: Some(header), learned: true });
    }
    let caller = claims.caller().as_str().to_owned();
    if claims.is_ours() && granted_now.is_none() {
        return Err(Refused::NotPermitted { caller });
    }
    Err(Refused::ScopeMissing { caller, missing })
}

enum Needed<'a> {
    Nothing,
    AnyScope,
    All(&'a ScopeSet),
}

/// The scopes that count, and their header. Nothing is built while the whole token still counts.
fn holding<'a>(
    claims: &'a Claims,
    granted_now: Option<&ScopeSet>,
) -> (Cow<'a, ScopeSet>, HeaderValue) {
    let whole = || (Cow::Borrowed(claims.scopes()), claims.scopes_header().clone());
    match (claims.caller(), granted_now) {
        (Caller::Foreign(_), _) => whole(),
        (Caller::Ours(_), Some(granted)) if granted.covers(claims.scopes()) => whole(),
        (Caller::Ours(_), granted) => {
            let held =
                granted.map(|granted| claims.scopes().intersection(granted)).unwrap_or_default();
            let header = scopes_header(&held);
            (Cow::Owned(held), header)
        }
    }
}

/// Scopes as a header value, space separated.
pub(super) fn scopes_header(scopes: &ScopeSet) -> HeaderValue {
    // Scopes are printable ASCII (RFC 6749 §3.3), so the fallback is out of reach.
    HeaderValue::try_from(scopes.to_string()).unwrap_or_else(|_| HeaderValue::from_static(""))
}

/// What an inbound request must show.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Access {
    /// Nothing.
    Public,
    /// A valid token with all of these scopes; none listed: any valid token.
    Scopes(ScopeSet),
}

/// Which paths a rule means; compared after [`normalise`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PathRule {
    /// This path alone.
    Exact(String),
    /// Every path that begins so; ends in `/`.
    Prefix(String),
}

impl FromStr for PathRule {
    type Err = RuleFault;
    /// Reads `/healthz`, or a prefix ending in `/*`.
    fn from_str(text: &str) -> Result<Self, RuleFault> {
        let (path, prefix) = match text.strip_suffix("/*") {
            Some(_) => (text.strip_suffix('*').unwrap_or(text), true),
            None => (text, false),
        };
        if path.contains(['*', '?', '#']) {
            return Err(RuleFault::Pattern);
        }
        let path = normalise(path)?.into_owned();
        Ok(if prefix { Self::Prefix(path) } else { Self::Exact(path) })
    }
}

/// One rule: these methods on these paths need this.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Which paths.
    pub path: PathRule,
    /// Which methods; `None`: all.
    pub methods: Option<Vec<Method>>,
    /// What is needed.
    pub access: Access,
}

impl Rule {
    fn matches(&self, method: &Method, path: &str) -> bool {
        let here = match &self.path {
            PathRule::Exact(exact) => path == exact,
            PathRule::Prefix(prefix) => path.starts_with(prefix.as_str()),
        };
        here && self.methods.as_ref().is_none_or(|methods| methods.contains(method))
    }
}

/// Why a rule cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RuleFault {
    /// A `*` anywhere but in a final `/*`, or a query.
    #[error("a path is exact, or a prefix ending in /*; no other *, no ? and no #")]
    Pattern,
    /// The path cannot be compared.
    #[error("the path of a rule must be clear")]
    Path(#[from] PathFault),
    /// A prefix must end at a segment.
    #[error("a prefix ends in /")]
    OpenPrefix,
}

/// The rules of one inbound listener; the first match wins.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    /// `None`: there are no rules, and any granted scope opens every path.
    list: Option<Vec<Rule>>,
}

/// What a request does, in the eyes of the rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action<'a> {
    /// Open to everybody.
    Public,
    /// Needs all of these scopes.
    Scopes(&'a ScopeSet),
    /// There are no rules: any one scope will do.
    AnyScope,
    /// There are rules, and none names it.
    Unlisted,
    /// The path cannot be compared.
    Unclear(PathFault),
}

impl Action<'_> {
    /// The grant of a public path, for which nobody is asked who it is.
    #[must_use]
    pub fn open(&self) -> Option<Grant> {
        matches!(self, Self::Public).then_some(Grant { scopes: None, learned: false })
    }
}

impl Rules {
    /// Takes the rules in order; `None` when the listener has none.
    ///
    /// # Errors
    /// [`RuleFault`] with the index of the rule whose path cannot be used.
    pub fn new(list: Option<Vec<Rule>>) -> Result<Self, (usize, RuleFault)> {
        let Some(mut list) = list else { return Ok(Self { list: None }) };
        for (at, rule) in list.iter_mut().enumerate() {
            let (PathRule::Exact(path) | PathRule::Prefix(path)) = &mut rule.path;
            *path = normalise(path).map_err(|fault| (at, fault.into()))?.into_owned();
            if matches!(&rule.path, PathRule::Prefix(prefix) if !prefix.ends_with('/')) {
                return Err((at, RuleFault::OpenPrefix));
            }
        }
        Ok(Self { list: Some(list) })
    }

    /// What `method` on `path` (without its query) needs.
    ///
    /// A path that servers read in more than one way (`%2F`, `\`, `;`) is judged in each of them, and is
    /// clear only when all lead to the same rule.
    #[must_use]
    pub fn action(&self, method: &Method, path: &str) -> Action<'_> {
        let Some(list) = &self.list else { return Action::AnyScope };
        let find = |reading| {
            let path = canonical(path, reading)?;
            Ok(list.iter().position(|rule| rule.matches(method, &path)))
        };
        let found = match find(Reading::LITERAL) {
            Ok(found) => found,
            Err(fault) => return Action::Unclear(fault),
        };
        for other in Reading::others(path) {
            match find(other) {
                Ok(same) if same == found => {}
                Ok(_) => return Action::Unclear(PathFault::Ambiguous),
                Err(fault) => return Action::Unclear(fault),
            }
        }
        match found.and_then(|at| list.get(at)).map(|rule| &rule.access) {
            None => Action::Unlisted,
            Some(Access::Public) => Action::Public,
            Some(Access::Scopes(scopes)) => Action::Scopes(scopes),
        }
    }
}

/// Why a path cannot be compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PathFault {
    /// It does not begin with `/`.
    #[error("a path begins with /")]
    Relative,
    /// A `%` without two hexadecimal digits, text that is not UTF-8, or a control character.
    #[error("the path cannot be decoded")]
    Undecodable,
    /// Servers disagree on what it means: above the root, `//` beside `..`, encoded twice.
    #[error("the path can be read in two ways")]
    Ambiguous,
}

/// One way in which servers read a path.
#[derive(Clone, Copy)]
struct Reading {
    /// `%2F`, `%5C` and `\` separate segments.
    slashes: bool,
    /// What follows a `;` in a segment is a parameter and not part of its name.
    parameters: bool,
}

impl Reading {
    const LITERAL: Self = Self { slashes: false, parameters: false };

    /// The other ways that could make a difference for this path: none for nearly all.
    fn others(path: &str) -> impl Iterator<Item = Self> {
        let encoded = |hex: &[u8; 2]| {
            path.as_bytes().windows(3).any(|part| {
                matches!(part, [b'%', a, b] if *a == hex[0] && b.to_ascii_uppercase() == hex[1])
            })
        };
        let slashes = path.contains('\\') || encoded(b"2F") || encoded(b"5C");
        let parameters = path.contains(';') || encoded(b"3B");
        [(slashes, true, false), (parameters, false, true), (slashes && parameters, true, true)]
            .into_iter()
            .filter(|(present, ..)| *present)
            .map(|(_, slashes, parameters)| Self { slashes, parameters })
    }
}

/// The form in which paths are compared: percent-decoded but for what would change the structure (`%25`,
/// `%2F`, `%3B`, `%3F`, `%23`, `%5C` stay, in upper case), without dot segments and empty segments.
/// Normalising twice changes nothing.
///
/// # Errors
/// [`PathFault`].
pub fn normalise(path: &str) -> Result<Cow<'_, str>, PathFault> {
    canonical(path, Reading::LITERAL)
}

fn canonical(path: &str, reading: Reading) -> Result<Cow<'_, str>, PathFault> {
    if is_plain(path) {
        return Ok(Cow::Borrowed(path));
    }
    if !path.starts_with('/') {
        // `*` is the target of a server-wide OPTIONS (RFC 9110 §7.1).
        return if path == "*" { Ok(Cow::Borrowed(path)) } else { Err(PathFault::Relative) };
    }
    let decoded = decode(path, reading)?;
    segments(&decoded, reading).map(Cow::Owned)
}

/// Whether the path is its own normal form, found in one pass.
fn is_plain(path: &str) -> bool {
    let mut before = 0;
    for &byte in path.as_bytes() {
        let calm = byte.is_ascii_alphanumeric()
            || matches!(byte, b'-' | b'_' | b'~' | b'!' | b'$' | b'&' | b'\'' | b'(' | b')')
            || matches!(byte, b'*' | b'+' | b',' | b'=' | b':' | b'@')
            || (byte == b'.' && before != b'/')
            || (byte == b'/' && before != b'/');
        if !calm || (before == 0 && byte != b'/') {
            return false;
        }
        before = byte;
    }
    before != 0
}

fn decode(path: &str, reading: Reading) -> Result<String, PathFault> {
    let mut out = Vec::with_capacity(path.len());
    let mut bytes = path.bytes();
    while let Some(byte) = bytes.next() {
        let (byte, encoded) = if byte == b'%' {
            (hex_pair(bytes.next(), bytes.next()).ok_or(PathFault::Undecodable)?, true)
        } else {
            (byte, false)
        };
        match byte {
            0..0x20 | 0x7f => return Err(PathFault::Undecodable),
            b'/' | b'\\' if reading.slashes => out.push(b'/'),
            b';' if encoded && reading.parameters => out.push(b';'),
            b'/' if encoded => out.extend_from_slice(b"%2F"),
            b'\\' if encoded => out.extend_from_slice(b"%5C"),
            b';' if encoded => out.extend_from_slice(b"%3B"),
            b'%' => out.extend_from_slice(b"%25"),
            b'?' if encoded => out.extend_from_slice(b"%3F"),
            b'#' if encoded => out.extend_from_slice(b"%23"),
            b'?' | b'#' => return Err(PathFault::Undecodable),
            _ => out.push(byte),
        }
    }
    // What decodes to another encoded dot or slash means something else to whoever decodes once more.
    let twice = |part: &[u8]| {
        let hex = part.get(3..).map(<[u8]>::to_ascii_uppercase);
        part.starts_with(b"%25") && matches!(hex.as_deref(), Some(b"2E" | b"2F" | b"5C"))
    };
    if out.windows(5).any(twice) {
        return Err(PathFault::Ambiguous);
    }
    String::from_utf8(out).map_err(|_source| PathFault::Undecodable)
}

fn hex_pair(high: Option<u8>, low: Option<u8>) -> Option<u8> {
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|value| u8::try_from(value).ok());
    Some(digit(high?)? << 4 | digit(low?)?)
}

/// Removes dot segments (RFC 3986 §5.2.4) and empty ones.
fn segments(path: &str, reading: Reading) -> Result<String, PathFault> {
    let mut kept: Vec<&str> = Vec::new();
    let (mut empties, mut climbs, mut open) = (false, false, false);
    let mut parts = path.split('/').skip(1).peekable();
    while let Some(part) = parts.next() {
        let name = match part.split_once(';') {
            Some((name, _parameters)) if reading.parameters => name,
            _ => part,
        };
        let last = parts.peek().is_none();
        open = last;
        match name {
            "" => empties |= !last,
            "." => {}
            ".." => {
                climbs = true;
                kept.pop().ok_or(PathFault::Ambiguous)?;
            }
            _ => {
                kept.push(name);
                open = false;
            }
        }
    }
    // Some servers count an empty segment as one to climb out of, others merge `//` first.
    if empties && climbs {
        return Err(PathFault::Ambiguous);
    }
    let mut out = String::with_capacity(path.len());
    for name in &kept {
        out.push('/');
        out.push_str(name);
    }
    if open || kept.is_empty() {
        out.push('/');
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::identity::{
        forge::{Forge, set},
        jwks::Jwks,
        keys::{Algorithm, KeySet},
        verify::{Trusted, Verifier},
    };

    fn scopes(text: &str) -> ScopeSet {
        ScopeSet::parse_list(text).unwrap()
    }

    fn claims(ours: bool, scope: &str) -> Claims {
        let key = Forge::new("k", Algorithm::EdDsa);
        let keys = Jwks::fixed("i".into(), KeySet::from_json(&set(&[&key])).unwrap());
        let trusted = Trusted { issuer: "i".into(), ours, audiences: Vec::new(), keys };
        let payload = json!({"iss": "i", "sub": "web", "aud": "data", "exp": 100, "scope": scope});
        let token = key.sign(&key.header().to_string(), &payload.to_string());
        Verifier::new(vec![trusted]).verify(token.as_bytes(), &["data"], 0).unwrap()
    }

    fn rules(list: &[(&str, &[Method], &str)]) -> Rules {
        let rule = |&(path, methods, access): &(&str, &[Method], &str)| Rule {
            path: path.parse().unwrap(),
            methods: (!methods.is_empty()).then(|| methods.to_vec()),
            access: match access {
                "public" => Access::Public,
                text => Access::Scopes(scopes(text)),
            },
        };
        Rules::new(Some(list.iter().map(rule).collect())).unwrap()
    }

    #[test]
    fn the_first_rule_that_matches_wins_and_the_rest_is_refused() {
        let rules = rules(&[
            ("/healthz", &[], "public"),
            ("/query", &[Method::POST], "write:query"),
            ("/admin/*", &[], "admin"),
            ("/reports/*", &[Method::GET], ""),
            ("/reports/*", &[], "write:data"),
        ]);
        let write = scopes("write:query");
        assert_eq!(rules.action(&Method::GET, "/healthz"), Action::Public);
        assert_eq!(rules.action(&Method::POST, "/query"), Action::Scopes(&write));
        assert_eq!(rules.action(&Method::GET, "/query"), Action::Unlisted);
        assert_eq!(rules.action(&Method::POST, "/query/"), Action::Unlisted);
        assert_eq!(rules.action(&Method::GET, "/admin"), Action::Unlisted);
        assert_eq!(rules.action(&Method::GET, "/"), Action::Unlisted);
        assert_eq!(rules.action(&Method::GET, "/reports/1"), Action::Scopes(&scopes("")));
        assert_eq!(rules.action(&Method::PUT, "/reports/1"), Action::Scopes(&scopes("write:data")));
        let none = Rules::new(None).unwrap();
        assert_eq!(none.action(&Method::GET, "/%zz"), Action::AnyScope);
        let empty = Rules::new(Some(Vec::new())).unwrap();
        assert_eq!(empty.action(&Method::GET, "/"), Action::Unlisted);
    }

    #[test]
    fn no_spelling_of_a_path_slips_past_its_rule() {
        let rules = rules(&[("/admin/*", &[], "admin"), ("/*", &[], "public")]);
        let admin = scopes("admin");
        for path in [
            "/admin/users",
            "//admin/users",
            "/admin//users",
            "/./admin/users",
            "/x/../admin/users",
            "/%61dmin/users",
            "/x/%2e%2E/admin/users",
            "/admin/users/",
            "/admin/users;v=1",
        ] {
            assert_eq!(rules.action(&Method::GET, path), Action::Scopes(&admin), "{path}");
        }
        for path in [
            "/admin%2Fusers",
            "/admin%5cusers",
            "/admin\\users",
            "/x%2f..%2fadmin/users",
            "/x/..;/admin/users",
            "/admin;x=1/users",
            "/admin%3bx/users",
            "/x;/..%2f;/admin/users",
            "/%252e%252e/admin",
            "/x//../../admin/users",
            "/../admin/users",
        ] {
            let action = rules.action(&Method::GET, path);
            assert_eq!(action, Action::Unclear(PathFault::Ambiguous), "{path}");
        }
        for path in ["/%", "/%4", "/%zz", "/%00", "/%c0%ae", "/%ff", "/a%0d%0ab", "/a?b"] {
            let action = rules.action(&Method::GET, path);
            assert_eq!(action, Action::Unclear(PathFault::Undecodable), "{path}");
        }
        assert_eq!(rules.action(&Method::GET, "admin"), Action::Unclear(PathFault::Relative));
        // Both readings lead to the same rule, so nothing is unclear.
        assert_eq!(rules.action(&Method::GET, "/files/a%2Fb"), Action::Public);
        assert_eq!(rules.action(&Method::GET, "/files/a;b=c"), Action::Public);
    }

    #[test]
    fn rules_themselves_must_be_clear() {
        for bad in ["/a*", "/*/b", "a", "/a?b", "/%zz", "/../a"] {
            assert!(bad.parse::<PathRule>().is_err(), "{bad}");
        }
        assert_eq!("/*".parse::<PathRule>().unwrap(), PathRule::Prefix("/".to_owned()));
        let open = Rule {
            path: PathRule::Prefix("/adm".to_owned()),
            methods: None,
            access: Access::Public,
        };
        assert_eq!(Rules::new(Some(vec![open])), Err((0, RuleFault::OpenPrefix)));
    }

    #[test]
    fn our_scopes_count_only_while_they_are_granted() {
        let claims = claims(true, "read:data write:query");
        let (read, write) = (scopes("read:data"), scopes("write:query"));
        let (more, other, nothing) = (scopes("read:data write:data"), scopes("other"), scopes(""));
        let now = |action, granted| admit(&claims, action, granted, None, Strictness::Enforce);

        let grant = now(Action::Scopes(&read), Some(&more)).unwrap();
        assert_eq!(grant.scopes().unwrap(), "read:data");
        let missing = now(Action::Scopes(&write), Some(&read)).unwrap_err();
        let expected = Refused::ScopeMissing { caller: "web".to_owned(), missing: write.clone() };
        assert_eq!(missing, expected);
        let gone = Refused::NotPermitted { caller: "web".to_owned() };
        assert_eq!(now(Action::Scopes(&write), None).unwrap_err(), gone);
        assert_eq!(now(Action::AnyScope, None).unwrap_err(), gone);
        assert!(now(Action::AnyScope, Some(&read)).is_ok());
        let none_left = now(Action::AnyScope, Some(&other));
        assert!(matches!(none_left, Err(Refused::ScopeMissing { .. })));
        // Any valid token will do, and it is told that nothing of it counts.
        let grant = now(Action::Scopes(&nothing), None).unwrap();
        assert_eq!(grant.scopes().unwrap(), "");
        assert_eq!(now(Action::Unlisted, Some(&read)).unwrap_err(), Refused::Unlisted);
    }

    #[test]
    fn another_issuers_scopes_are_its_own() {
        let claims = claims(false, "read:data");
        let (read, write) = (scopes("read:data"), scopes("write:query"));
        assert!(admit(&claims, Action::Scopes(&read), None, None, Strictness::Enforce).is_ok());
        for strictness in [Strictness::Enforce, Strictness::Learn] {
            let refused = admit(&claims, Action::Scopes(&write), Some(&write), None, strictness);
            assert!(matches!(refused, Err(Refused::ScopeMissing { .. })));
        }
    }

    #[test]
    fn where_any_scope_will_do_another_issuers_must_be_one_of_the_services() {
        let claims = claims(false, "openid read:data");
        let any = |listed| admit(&claims, Action::AnyScope, None, listed, Strictness::Enforce);
        let (data, reports, nothing) = (scopes("read:data"), scopes("read:all"), scopes(""));
        assert!(any(Some(&data)).is_ok());
        for listed in [&reports, &nothing] {
            assert!(matches!(any(Some(listed)), Err(Refused::ScopeMissing { .. })), "{listed}");
        }
        // A proxy that has no snapshot yet does not know them.
        assert!(any(None).is_ok());
    }

    #[test]
    fn a_learning_project_lets_missing_grants_through_and_says_so() {
        let until: jiff::Timestamp = "2026-12-01T00:00:00Z".parse().unwrap();
        let mode = Enforcement::LearnUntil(until);
        let before = until - jiff::SignedDuration::from_secs(1);
        assert_eq!(Strictness::at(&mode, before), Strictness::Learn);
        assert_eq!(Strictness::at(&mode, until), Strictness::Enforce);
        let claims = claims(true, "read:data");
        let write = scopes("write:query");
        let grant = admit(&claims, Action::Scopes(&write), None, None, Strictness::Learn).unwrap();
        assert!(grant.is_learned());
        let unlisted = admit(&claims, Action::Unlisted, None, None, Strictness::Learn);
        assert_eq!(unlisted.unwrap_err(), Refused::Unlisted);
    }

    proptest! {
        #[test]
        fn normalising_twice_changes_nothing(path in "/[a-z./%;25eEfF\\\\A]{0,24}") {
            if let Ok(once) = normalise(&path) {
                prop_assert_eq!(normalise(&once), Ok(Cow::Borrowed(&*once)));
            }
        }

        #[test]
        fn no_path_panics(path in "\\PC{0,40}") {
            let rules = rules(&[("/a/*", &[], "public")]);
            let _any = rules.action(&Method::GET, &path);
            if let Ok(once) = normalise(&path) {
                prop_assert_eq!(normalise(&once), Ok(Cow::Borrowed(&*once)));
                prop_assert!(!once.contains("//") && !once.contains("/../"));
            }
        }

        #[test]
        fn what_is_plain_is_left_alone(path in "(/[a-z0-9_~-]{1,8}){1,4}/?") {
            prop_assert!(matches!(normalise(&path), Ok(Cow::Borrowed(same)) if same == path));
        }
    }
}
