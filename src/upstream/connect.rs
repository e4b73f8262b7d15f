//! The way to one address: resolve, connect, shake hands.

use std::{io, net::SocketAddr, rc::Rc, sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use rustls::pki_types::ServerName;
use tokio::{
    net::TcpStream,
    time::{Instant, timeout_at},
};
use tokio_rustls::TlsConnector;

use crate::{
    model::{Host, Origin, Scheme},
    net::{
        Alpn, ClientTls, Resolver, Stream, Tallied, Tally, connect_any, is_certificate_fault,
        is_own, is_tls_fault,
    },
};

/// Why no connection could be had. Nothing of a request has been sent then.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The name has no address.
    #[error("the name does not resolve")]
    Resolve,
    /// The address is one of this proxy's own listeners.
    #[error("the address is the proxy's own")]
    Own,
    /// Nothing listens there, or it cannot be reached.
    #[error("the connection was refused")]
    Refused(#[source] io::Error),
    /// It took too long.
    #[error("connecting took too long")]
    Timeout,
    /// The peer's certificate is not accepted.
    #[error("the certificate is not accepted")]
    Certificate(#[source] io::Error),
    /// TLS failed otherwise.
    #[error("TLS failed")]
    Tls(#[source] io::Error),
    /// The peer does not speak the HTTP version that is needed.
    #[error("the peer does not speak the HTTP version that is needed")]
    Protocol,
    /// The peer refuses HTTP/1.1 in ALPN.
    #[error("the peer speaks HTTP/2 only")]
    WantsH2,
}

/// Addresses that no call may go to: the proxy's own listeners. Clones are the same list, also of those that open later.
#[derive(Clone, Debug, Default)]
pub struct OwnAddresses(Arc<ArcSwap<Vec<SocketAddr>>>);

impl OwnAddresses {
    /// These listeners, and no others from now on.
    pub fn set(&self, addresses: Vec<SocketAddr>) {
        self.0.store(Arc::new(addresses));
    }

    /// Whether a call to `address` would come back to us.
    #[must_use]
    pub fn contains(&self, address: SocketAddr) -> bool {
        is_own(&self.0.load(), address)
    }
}

/// The way to one address.
pub struct Connector {
    address: Origin,
    /// Whom the certificate must name; `None`: plaintext.
    tls: Option<(ServerName<'static>, Arc<ClientTls>)>,
    resolver: Resolver,
    tally: Option<Rc<dyn Tally>>,
    tunnel_tally: Option<Rc<dyn Tally>>,
    own: OwnAddresses,
}

impl Connector {
    /// The way to `address`; over TLS where it says `https`, to whoever proves to be `name`.
    ///
    /// # Errors
    /// [`ConnectError::Protocol`] when `name` cannot stand in a certificate.
    pub fn new(
        address: Origin,
        name: &Host,
        tls: &Arc<ClientTls>,
        resolver: Resolver,
        own: OwnAddresses,
    ) -> Result<Self, ConnectError> {
        let tls = match address.scheme() {
            Scheme::Http => None,
            Scheme::Https => {
                let name = match name {
                    Host::Name(name) => ServerName::try_from(name.to_string())
                        .map_err(|_source| ConnectError::Protocol)?,
                    Host::Address(ip) => ServerName::IpAddress((*ip).into()),
                };
                Some((name, Arc::clone(tls)))
            }
        };
        Ok(Self { address, tls, resolver, tally: None, tunnel_tally: None, own })
    }

    /// Tells `tally` how many bytes its connections move.
    #[must_use]
    pub fn tallied(mut self, tally: Rc<dyn Tally>) -> Self {
        self.tally = Some(tally);
        self
    }

    /// Tells `tally` how many bytes its tunnels move.
    #[must_use]
    pub fn tunnels_tallied(mut self, tally: Rc<dyn Tally>) -> Self {
        self.tunnel_tally = Some(tally);
        self
    }

    /// Where it leads.
    #[must_use]
    pub fn address(&self) -> &Origin {
        &self.address
    }

    /// Whether TLS is spoken.
    #[must_use]
    pub fn is_tls(&self) -> bool {
        self.tls.is_some()
    }

    /// A bare connection without TLS of ours, for a tunnel.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub async fn open_tunnel(&self, deadline: Instant) -> Result<Stream, ConnectError> {
        let (tcp, _trip) = self.dial(deadline).await?;
        Ok(Stream::plain(Tallied::new(tcp, self.tunnel_tally.clone())))
    }

    /// A connection that speaks HTTP/1.1, and how long a round trip takes.
    ///
    /// # Errors
    /// [`ConnectError`]; [`ConnectError::WantsH2`] when the peer would rather speak HTTP/2.
    pub(super) async fn open_h1(
        &self,
        deadline: Instant,
    ) -> Result<(Stream, Duration), ConnectError> {
        self.open(Alpn::H1, deadline).await
    }

    /// A connection that speaks HTTP/2, and how long a round trip takes.
    ///
    /// # Errors
    /// [`ConnectError`]; [`ConnectError::Protocol`] when ALPN chose something else.
    pub(super) async fn open_h2(
        &self,
        deadline: Instant,
    ) -> Result<(Stream, Duration), ConnectError> {
        let (stream, trip) = self.open(Alpn::H2, deadline).await?;
        if stream.is_tls() && stream.alpn() != Some(b"h2") {
            return Err(ConnectError::Protocol);
        }
        Ok((stream, trip))
    }

    async fn open(
        &self,
        alpn: Alpn,
        deadline: Instant,
    ) -> Result<(Stream, Duration), ConnectError> {
        let (tcp, trip) = self.dial(deadline).await?;
        let tcp = Tallied::new(tcp, self.tally.clone());
        let Some((name, tls)) = &self.tls else { return Ok((Stream::plain(tcp), trip)) };
        let shake = TlsConnector::from(tls.config(alpn)).connect(name.clone(), tcp);
        match timeout_at(deadline, shake).await {
            Ok(Ok(stream)) => Ok((Stream::client(stream), trip)),
            Ok(Err(error)) => Err(tls_error(error, alpn)),
            Err(_elapsed) => Err(ConnectError::Timeout),
        }
    }

    async fn dial(&self, deadline: Instant) -> Result<(TcpStream, Duration), ConnectError> {
        let resolving = self.resolver.resolve(self.address.host(), self.address.port());
        let addresses = timeout_at(deadline, resolving)
            .await
            .map_err(|_elapsed| ConnectError::Timeout)?
            .map_err(|error| {
                tracing::debug!(
                    error = &error as &dyn std::error::Error,
                    "an endpoint's name does not resolve"
                );
                ConnectError::Resolve
            })?;
        // DESIGN §5: the outbound port never dials the proxy's own listeners.
        if addresses.iter().any(|address| self.own.contains(*address)) {
            return Err(ConnectError::Own);
        }
        let begun = Instant::now();
        let tcp = connect_any(&addresses, deadline.saturating_duration_since(begun))
            .await
            .map_err(|error| {
                let late = error.kind() == io::ErrorKind::TimedOut;
                if late { ConnectError::Timeout } else { ConnectError::Refused(error) }
            })?;
        Ok((tcp, begun.elapsed()))
    }
}

fn tls_error(error: io::Error, alpn: Alpn) -> ConnectError {
    let inner = error.get_ref().and_then(|source| source.downcast_ref::<rustls::Error>());
    let no_protocol = matches!(
        inner,
        Some(rustls::Error::AlertReceived(rustls::AlertDescription::NoApplicationProtocol))
    );
    match (no_protocol, alpn) {
        (true, Alpn::H1) => ConnectError::WantsH2,
        (true, Alpn::None | Alpn::H2 | Alpn::H2OrH1) => ConnectError::Protocol,
        (false, _) if is_certificate_fault(&error) => ConnectError::Certificate(error),
        (false, _) if is_tls_fault(&error) => ConnectError::Tls(error),
        (false, _) => ConnectError::Refused(error),
    }
}
