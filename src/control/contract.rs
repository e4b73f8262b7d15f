//! The API as a document: OpenAPI 3.1, made of the routes themselves, with every refusal from the one table of them.

use std::{borrow::Cow, collections::BTreeMap};

use utoipa::{
    IntoResponses, PartialSchema, ToSchema,
    openapi::{
        AllOfBuilder, Components, ContentBuilder, HeaderBuilder, InfoBuilder, ObjectBuilder,
        OpenApi as Document, Ref, RefOr, Response, ResponseBuilder, Schema, Server, Type,
        security::{
            ClientCredentials, Flow, Http, HttpAuthScheme, HttpBuilder, OAuth2, Scopes,
            SecurityScheme,
        },
    },
};

use crate::{
    api::{
        CATALOG_READ, Change, ENDPOINTS_OWN, KEYS_WRITE, OauthRefusal, PROJECT_WRITE,
        REGISTRY_WRITE, Standing, USAGE_WRITE,
    },
    control::reject::{Code, Problem},
};

/// The document before any route is in it: what no operation returns as such, the body of refusals and the events of the
/// watch.
pub(super) fn basis() -> Document {
    let mut schemas = Vec::new();
    add::<Problem>(&mut schemas);
    add::<OauthRefusal>(&mut schemas);
    add::<Change>(&mut schemas);
    add::<Standing>(&mut schemas);
    let mut components = Components::new();
    components.schemas.extend(schemas);
    let mut document = Document::default();
    document.components = Some(components);
    document
}

/// A schema by its name, and those it refers to.
fn add<T: ToSchema>(schemas: &mut Vec<(String, RefOr<Schema>)>) {
    schemas.push((T::name().into_owned(), T::schema()));
    T::schemas(schemas);
}

/// The document of a control plane that others reach at `issuer`.
pub(super) fn finish(mut document: Document, issuer: &str) -> Document {
    document.info = InfoBuilder::new()
        .title("infrar control plane")
        .version(env!("CARGO_PKG_VERSION"))
        .description(Some(
            "Registry, token issuer and catalog. Every refusal is a problem document (RFC 9457) with a stable `code`, but at the \
             token endpoint, which answers as RFC 6749 says. Every route has a limit of its rate for each caller, or for each \
             address where callers prove nothing (429 with `retry-after`), and of its body.",
        ))
        .license(Some(utoipa::openapi::License::new("Apache-2.0")))
        .build();
    document.servers = Some(vec![Server::new(issuer)]);
    let components = document.components.get_or_insert_default();
    let bearer = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).bearer_format("JWT").description(
        Some("A token of this control plane for the audience `infrar-control`, with the scope that the operation names."),
    );
    let scopes = [
        (CATALOG_READ, "reads catalog, services and changes; every identity has it"),
        (USAGE_WRITE, "reports usage; every identity has it"),
        (ENDPOINTS_OWN, "registers endpoints of the caller's own service; every identity has it"),
        (REGISTRY_WRITE, "changes endpoints of any service"),
        (PROJECT_WRITE, "reads and replaces the project"),
        (KEYS_WRITE, "rotates the signing keys"),
    ];
    let scopes = Scopes::from_iter(scopes.map(|(name, what)| (name.to_owned(), what.to_owned())));
    let flow = ClientCredentials::new(format!("{issuer}/oauth2/token"), scopes);
    let schemes = [
        ("bearer", SecurityScheme::Http(bearer.build())),
        ("client", SecurityScheme::OAuth2(OAuth2::new([Flow::ClientCredentials(flow)]))),
        ("basic", SecurityScheme::Http(Http::new(HttpAuthScheme::Basic))),
    ];
    components
        .security_schemes
        .extend(schemes.map(|(name, scheme)| (name.to_owned(), scheme.into())));
    document
}

/// Kinds of refusals, as operations name them among their answers. One operation names no status twice.
macro_rules! refusals {
    ($($(#[$doc:meta])* $name:ident: $($code:ident)+;)+) => {$(
        $(#[$doc])*
        pub(super) enum $name {}

        impl IntoResponses for $name {
            fn responses() -> BTreeMap<String, RefOr<Response>> {
                problems(&[$(Code::$code),+])
            }
        }
    )+};
}

refusals! {
    /// What may be answered to anybody.
    Anybody: RateLimited BodyTooLarge Internal;
    /// What may be answered wherever a token is needed.
    Guarded: TokenMissing TokenInvalid TokenExpired ScopeMissing BodyTooLarge RateLimited Internal NotReady
        StoreUnavailable Overloaded Deadline;
    /// What speaks of a service.
    OfService: BadRequest UnknownService;
    /// What speaks of an endpoint.
    OfEndpoint: BadRequest UnknownService UnknownEndpoint;
    /// What only has a path, a query or a body that may be wrong.
    Malformed: BadRequest;
    /// What changes an endpoint, wherever it comes from.
    Adjusting: RevisionMismatch;
    /// What takes an endpoint away.
    Changing: RevisionMismatch OwnedByProject;
    /// What registers an endpoint.
    Registering: RevisionMismatch OwnedByProject HostTaken;
    /// What replaces the project.
    Replacing: BadRequest ReservedName ProjectRenamed RevisionMismatch;
    /// What has a body.
    Reading: UnsupportedMediaType;
}

fn problems(codes: &[Code]) -> BTreeMap<String, RefOr<Response>> {
    let mut statuses: BTreeMap<u16, Vec<Code>> = BTreeMap::new();
    for code in codes {
        statuses.entry(code.status().as_u16()).or_default().push(*code);
    }
    statuses
        .into_iter()
        .map(|(status, codes)| (status.to_string(), RefOr::T(problem(status, &codes))))
        .collect()
}

fn problem(status: u16, codes: &[Code]) -> Response {
    let said: Vec<String> =
        codes.iter().map(|code| format!("{}: `{}`", code.title(), code.as_str())).collect();
    let code = ObjectBuilder::new()
        .schema_type(Type::String)
        .enum_values(Some(codes.iter().map(|code| code.as_str())));
    let narrowed = ObjectBuilder::new().property("code", code);
    let schema = AllOfBuilder::new().item(Ref::from_schema_name("Problem")).item(narrowed);
    let content = ContentBuilder::new().schema(Some(Schema::AllOf(schema.build()))).build();
    let response = ResponseBuilder::new()
        .description(said.join("; "))
        .content("application/problem+json", content);
    let header = |name: &str, kind: Type, what: &str, response: ResponseBuilder| {
        let schema = ObjectBuilder::new().schema_type(kind).build();
        let header = HeaderBuilder::new().schema(Some(schema)).description(Some(what)).build();
        response.header(name, header)
    };
    match status {
        401 | 403 => header("www-authenticate", Type::String, "RFC 6750 §3", response).build(),
        429 | 503 => header("retry-after", Type::Integer, "Seconds", response).build(),
        _ => response.build(),
    }
}

/// The refusals of the token endpoint (RFC 6749 §5.2).
pub(super) enum NoToken {}

impl IntoResponses for NoToken {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        let answers = [
            (
                "400",
                "`invalid_request`, `unsupported_grant_type`, `invalid_target`, `invalid_scope`",
            ),
            ("401", "`invalid_client`"),
            ("408", "`invalid_request`: the form did not arrive in time"),
            ("413", "`invalid_request`: the form is larger than is taken here"),
            ("429", "`temporarily_unavailable`: too often from this address"),
            ("500", "`server_error`"),
        ];
        let schema = || Ref::from_schema_name(OauthRefusal::name());
        let answer = |description: &str| {
            let content = ContentBuilder::new().schema(Some(schema())).build();
            ResponseBuilder::new().description(description).content("application/json", content)
        };
        let answers =
            answers.map(|(status, what)| (status.to_owned(), answer(what).build().into()));
        answers.into()
    }
}

/// What is asked of the token endpoint.
#[derive(ToSchema)]
#[expect(dead_code, reason = "written into the document; `tokens::form` reads it")]
pub(super) struct TokenForm {
    /// The one grant that is spoken here.
    #[schema(pattern = "^client_credentials$")]
    grant_type: String,
    /// Who asks, unless HTTP Basic says so.
    client_id: Option<String>,
    /// The client's secret, unless HTTP Basic has it.
    client_secret: Option<String>,
    /// The callee, by its name.
    audience: Option<String>,
    /// The callee (RFC 8707): `https://NAME.infrar.internal`.
    resource: Option<String>,
    /// Scopes, separated by spaces; without them all that are granted.
    scope: Option<String>,
}

/// Any JSON object: what other documents define (JWK sets, RFC 8414 metadata).
pub(super) enum Foreign {}

impl PartialSchema for Foreign {
    fn schema() -> RefOr<Schema> {
        ObjectBuilder::new().schema_type(Type::Object).build().into()
    }
}

impl ToSchema for Foreign {
    fn name() -> Cow<'static, str> {
        Cow::Borrowed("Object")
    }
}
