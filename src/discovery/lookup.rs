//! One question to DNS, and what came of it with its time to live.
//!
//! A resolver serves one round of questions and is then dropped: it remembers nothing beyond it, so that an answer is
//! asked for again exactly when its time is over, and `/etc/resolv.conf` is read as it is by then.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use hickory_resolver::{
    TokioResolver,
    config::{ConnectionConfig, NameServerConfig, ResolveHosts, ResolverConfig},
    lookup::Lookup,
    net::{DnsError, NetError, runtime::TokioRuntimeProvider},
    proto::{
        op::ResponseCode,
        rr::{Name, RData, RecordType},
    },
};
use tokio::time::timeout;

/// Longest wait for one answer, with all that the resolver tries meanwhile.
const LIMIT: Duration = Duration::from_secs(10);
/// Longest chain of aliases.
const ALIASES: usize = 8;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum LookupFault {
    /// NXDOMAIN.
    #[error("there is no such name")]
    NoSuchName,
    /// The name is there, with other records.
    #[error("the name has no record of this kind")]
    NoRecord,
    /// SERVFAIL and others.
    #[error("the server answered {0}")]
    Refused(ResponseCode),
    /// Nobody answered.
    #[error("no answer came in time")]
    Timeout,
    /// No question could be put, or the answer was not understood.
    #[error("the question could not be put")]
    Failed(#[source] NetError),
}

impl LookupFault {
    /// Whether DNS said for certain that there is nothing.
    pub(super) fn is_negative(&self) -> bool {
        match self {
            Self::NoSuchName | Self::NoRecord => true,
            Self::Refused(_) | Self::Timeout | Self::Failed(_) => false,
        }
    }

    /// The same for whoever calls a service that has no endpoint for it.
    pub(super) fn absence(&self) -> &'static str {
        match self {
            Self::NoSuchName => "DNS knows no such name as it should be found by",
            Self::NoRecord => "DNS has no address under the name that it should be found by",
            Self::Refused(_) | Self::Timeout | Self::Failed(_) => {
                "the name that it should be found by could not be looked up in DNS"
            }
        }
    }
}

/// IPv4 or IPv6.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Family {
    V4,
    V6,
}

/// An SRV record (RFC 2782).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Offer {
    pub(super) priority: u16,
    pub(super) weight: u16,
    pub(super) port: u16,
    /// Without the dot at its end; empty: the service is decidedly not offered.
    pub(super) target: String,
}

/// Records, and how long they hold: the least of theirs and of the aliases that led there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Answer<T> {
    pub(super) records: Vec<T>,
    pub(super) ttl: Duration,
}

/// Who is asked.
pub(super) trait Ask: Send + Sync {
    /// The addresses of a name.
    fn addresses(
        &self,
        name: &str,
        family: Family,
    ) -> impl Future<Output = Result<Answer<IpAddr>, LookupFault>> + Send;

    /// Where a service is offered.
    fn offers(&self, name: &str)
    -> impl Future<Output = Result<Answer<Offer>, LookupFault>> + Send;
}

/// DNS itself, for one round of questions.
pub(super) struct Dns(TokioResolver);

impl Dns {
    /// Asks `server`, or those of this system.
    ///
    /// # Errors
    /// [`LookupFault::Failed`] when the system does not say whom to ask.
    pub(super) fn new(server: Option<SocketAddr>) -> Result<Self, LookupFault> {
        let mut builder = match server {
            None => TokioResolver::builder_tokio().map_err(LookupFault::Failed)?,
            Some(server) => {
                let connections =
                    [ConnectionConfig::udp(), ConnectionConfig::tcp()].map(|mut it| {
                        it.port = server.port();
                        it
                    });
                let server = NameServerConfig::new(server.ip(), true, connections.into());
                let config = ResolverConfig::from_parts(None, Vec::new(), vec![server]);
                let mut builder =
                    TokioResolver::builder_with_config(config, TokioRuntimeProvider::default());
                let options = builder.options_mut();
                options.use_hosts_file = ResolveHosts::Never;
                options.timeout = Duration::from_secs(2);
                builder
            }
        };
        // The aliases on the way are part of the answer: their times to live count.
        builder.options_mut().preserve_intermediates = true;
        builder.build().map(Self).map_err(LookupFault::Failed)
    }

    async fn ask(&self, name: Name, kind: RecordType) -> Result<Lookup, LookupFault> {
        match timeout(LIMIT, self.0.lookup(name, kind)).await {
            Ok(Ok(lookup)) => Ok(lookup),
            Ok(Err(NetError::Dns(DnsError::NoRecordsFound(none)))) => {
                let none = none.response_code == ResponseCode::NXDomain;
                Err(if none { LookupFault::NoSuchName } else { LookupFault::NoRecord })
            }
            Ok(Err(NetError::Dns(DnsError::ResponseCode(code)))) => Err(LookupFault::Refused(code)),
            Ok(Err(NetError::Timeout)) | Err(_) => Err(LookupFault::Timeout),
            Ok(Err(error)) => Err(LookupFault::Failed(error)),
        }
    }
}

/// The name as it is meant: whole, so that no search list is tried.
fn absolute(name: &str) -> Result<Name, LookupFault> {
    let mut name = Name::from_ascii(name).map_err(|error| LookupFault::Failed(error.into()))?;
    name.set_fqdn(true);
    Ok(name)
}

/// What of an answer is wanted, and the least time to live of all that is in it.
fn answer<T>(
    lookup: &Lookup,
    wanted: impl Fn(&RData) -> Option<T>,
) -> Result<Answer<T>, LookupFault> {
    let records: Vec<T> = lookup.answers().iter().filter_map(|it| wanted(&it.data)).collect();
    if records.is_empty() {
        return Err(LookupFault::NoRecord);
    }
    let ttl = lookup.answers().iter().map(|it| it.ttl).min().unwrap_or(0);
    Ok(Answer { records, ttl: Duration::from_secs(ttl.into()) })
}

impl Ask for Dns {
    async fn addresses(&self, name: &str, family: Family) -> Result<Answer<IpAddr>, LookupFault> {
        let kind = match family {
            Family::V4 => RecordType::A,
            Family::V6 => RecordType::AAAA,
        };
        let lookup = self.ask(absolute(name)?, kind).await?;
        answer(&lookup, |data| {
            let address = match (data, family) {
                (RData::A(address), Family::V4) => IpAddr::V4(address.0),
                (RData::AAAA(address), Family::V6) => IpAddr::V6(address.0),
                _ => return None,
            };
            // Servers that block names say 0.0.0.0, which would be this machine.
            Some(address).filter(|it| !it.is_unspecified() && !it.is_multicast())
        })
    }

    async fn offers(&self, name: &str) -> Result<Answer<Offer>, LookupFault> {
        let mut name = absolute(name)?;
        let mut longest = Duration::MAX;
        for _ in 0..ALIASES {
            let fault = match self.ask(name.clone(), RecordType::SRV).await {
                Ok(lookup) => {
                    let mut found = answer(&lookup, offer)?;
                    found.ttl = found.ttl.min(longest);
                    return Ok(found);
                }
                Err(fault) if fault.is_negative() => fault,
                Err(fault) => return Err(fault),
            };
            // The resolver takes the target of an SRV record that an alias led to for a further alias, and finds
            // nothing there. So aliases are followed here.
            let Ok(lookup) = self.ask(name, RecordType::CNAME).await else { return Err(fault) };
            let alias = answer(&lookup, |data| {
                if let RData::CNAME(alias) = data { Some(alias.0.clone()) } else { None }
            });
            let Ok(Answer { mut records, ttl }) = alias else { return Err(fault) };
            longest = longest.min(ttl);
            let Some(next) = records.pop() else { return Err(fault) };
            name = next;
        }
        Err(LookupFault::NoRecord)
    }
}

fn offer(data: &RData) -> Option<Offer> {
    let RData::SRV(srv) = data else { return None };
    let target = srv.target.to_ascii().to_ascii_lowercase();
    let target = target.trim_end_matches('.').to_owned();
    Some(Offer { priority: srv.priority, weight: srv.weight, port: srv.port, target })
}

#[cfg(test)]
#[path = "../../tests/support/dns.rs"]
mod server;

#[cfg(test)]
mod tests {
    use hickory_resolver::proto::op::ResponseCode::ServFail;

    use super::{
        server::{Says, Server, address, alias, srv},
        *,
    };

    const NAME: &str = "data.example.com";

    async fn addresses(server: &Server, family: Family) -> Result<Answer<IpAddr>, LookupFault> {
        Dns::new(Some(server.at)).unwrap().addresses(NAME, family).await
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn seconds(ttl: u64) -> Duration {
        Duration::from_secs(ttl)
    }

    #[tokio::test]
    async fn an_answer_holds_for_the_least_time_on_the_way_to_it() {
        let server = Server::start().await;
        let (one, two) = ("one.example.net", "two.example.org");
        // In one message, as a recursive server answers.
        let chain = vec![
            alias(NAME, 300, one),
            alias(one, 7, two),
            address(two, 60, ip("192.0.2.1")),
            address(two, 60, ip("192.0.2.2")),
        ];
        server.say(NAME, RecordType::A, Says::Records(chain));
        let answer = addresses(&server, Family::V4).await.unwrap();
        assert_eq!(answer.ttl, seconds(7));
        assert_eq!(answer.records, [ip("192.0.2.1"), ip("192.0.2.2")]);

        // In several, as one that leaves the rest to us.
        server.say(NAME, RecordType::AAAA, Says::Records(vec![alias(NAME, 9, one)]));
        server.say(one, RecordType::AAAA, Says::Records(vec![alias(one, 300, two)]));
        let last = vec![address(two, 60, ip("2001:db8::1"))];
        server.say(two, RecordType::AAAA, Says::Records(last));
        let answer = addresses(&server, Family::V6).await.unwrap();
        assert_eq!((answer.ttl, answer.records), (seconds(9), vec![ip("2001:db8::1")]));
        // And the time of the records themselves, when that is less.
        server.say(NAME, RecordType::A, Says::Records(vec![address(NAME, 3, ip("192.0.2.3"))]));
        assert_eq!(addresses(&server, Family::V4).await.unwrap().ttl, seconds(3));
    }

    #[tokio::test]
    async fn what_does_not_fit_into_a_datagram_comes_by_tcp() {
        let server = Server::start().await;
        let many: Vec<_> = (0..=255).map(|it| ip(&format!("198.51.100.{it}"))).collect();
        server.addresses(NAME, 60, &many);
        let answer = addresses(&server, Family::V4).await.unwrap();
        assert_eq!(answer.records.len(), 256);
        assert_eq!(server.asked(NAME, RecordType::A, "tcp"), 1);
    }

    #[tokio::test]
    async fn offers_come_with_all_that_they_say_also_behind_an_alias() {
        let server = Server::start().await;
        let (name, alias_of) = ("_https._tcp.example.com", "_https._tcp.example.net");
        let records = vec![
            srv(alias_of, 60, (1, 5, 8443), "Far.Example.com"),
            srv(alias_of, 30, (0, 7, 443), NAME),
        ];
        server.say(alias_of, RecordType::SRV, Says::Records(records.clone()));
        let dns = Dns::new(Some(server.at)).unwrap();
        let answer = dns.offers(alias_of).await.unwrap();
        let far = Offer { priority: 1, weight: 5, port: 8443, target: "far.example.com".into() };
        let near = Offer { priority: 0, weight: 7, port: 443, target: NAME.into() };
        assert_eq!((answer.ttl, answer.records), (seconds(30), vec![far.clone(), near.clone()]));

        let mut whole = vec![alias(name, 20, alias_of)];
        whole.extend(records);
        server.say(name, RecordType::SRV, Says::Records(whole));
        server.say(name, RecordType::CNAME, Says::Records(vec![alias(name, 20, alias_of)]));
        let dns = Dns::new(Some(server.at)).unwrap();
        let answer = dns.offers(name).await.unwrap();
        assert_eq!((answer.ttl, answer.records), (seconds(20), vec![far, near]));

        let nowhere = vec![srv(alias_of, 60, (0, 0, 0), ".")];
        server.say(alias_of, RecordType::SRV, Says::Records(nowhere));
        let dns = Dns::new(Some(server.at)).unwrap();
        assert_eq!(dns.offers(alias_of).await.unwrap().records[0].target, "");
    }

    #[tokio::test]
    async fn why_there_is_no_answer_is_told_apart() {
        let server = Server::start().await;
        let fault = addresses(&server, Family::V4).await.unwrap_err();
        assert!(matches!(fault, LookupFault::NoSuchName), "{fault:?}");
        server.addresses(NAME, 60, &[ip("2001:db8::1")]);
        let fault = addresses(&server, Family::V4).await.unwrap_err();
        assert!(matches!(fault, LookupFault::NoRecord), "{fault:?}");
        server.addresses(NAME, 60, &[ip("0.0.0.0")]);
        let fault = addresses(&server, Family::V4).await.unwrap_err();
        assert!(matches!(fault, LookupFault::NoRecord), "{fault:?}");
        server.say(NAME, RecordType::A, Says::Code(ServFail));
        let fault = addresses(&server, Family::V4).await.unwrap_err();
        assert!(matches!(fault, LookupFault::Refused(ServFail)), "{fault:?}");
        assert!(!fault.is_negative());
    }
}
