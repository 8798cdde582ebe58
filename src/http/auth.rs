//! Who is calling: the user at the other end of the Unix socket, or the holder of a bearer token. Says nothing
//! about what a caller may do. Runs before every route but the console's, whose token is its own.
use std::net::SocketAddr;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use host::Actor;
use model::Code;

use crate::error::Failure;
use crate::routes::Api;

/// The other end of a connection, as the system tells it.
#[derive(Debug, Clone)]
pub(crate) enum Peer {
    /// A process of this host.
    Local {
        /// Its user.
        uid: u32,
        /// Whether the socket trusts it.
        trusted: bool,
    },
    /// Someone at the TCP port.
    Remote {
        /// Where from.
        address: SocketAddr,
    },
}

/// Whom the Unix socket trusts: root, the daemon's own user, the members of one group.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Trusted {
    own_uid: u32,
    group_id: Option<u32>,
}

impl Trusted {
    /// Root, the user of this process, and `group_id`'s members.
    pub(crate) fn new(group_id: Option<u32>) -> Trusted {
        Trusted { own_uid: nix::unistd::geteuid().as_raw(), group_id }
    }

    /// Whether a peer of these credentials is trusted.
    pub(crate) fn trusts(&self, uid: u32, gid: u32, pid: Option<i32>) -> bool {
        uid == 0
            || uid == self.own_uid
            || self.group_id.is_some_and(|group_id| {
                gid == group_id || pid.is_some_and(|pid| supplementary(pid).contains(&group_id))
            })
    }
}

/// Supplementary groups of a process. The kernel's peer credentials hold the primary group only; the socket's
/// mode has made the kernel check membership at connect already, so this only confirms it.
fn supplementary(pid: i32) -> Vec<u32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let groups = status.lines().find_map(|line| line.strip_prefix("Groups:")).unwrap_or_default();
    groups.split_whitespace().filter_map(|group| group.parse().ok()).collect()
}

/// Finds out who is calling, or answers 401 or 403.
pub(crate) async fn identify(State(api): State<Api>, mut request: Request, next: Next) -> Response {
    let peer = request.extensions().get::<Peer>().cloned();
    match actor(&api, peer, request.headers()).await {
        Ok(actor) => {
            request.extensions_mut().insert(actor);
            next.run(request).await
        }
        Err(failure) => failure.into_response(),
    }
}

async fn actor(api: &Api, peer: Option<Peer>, headers: &HeaderMap) -> Result<Actor, Failure> {
    match peer {
        Some(Peer::Local { uid, trusted: true }) => Ok(Actor::Local { uid }),
        Some(Peer::Local { uid, trusted: false }) => {
            let detail = format!(
                "user {uid} may not use this socket; call as root, as the daemon's user or as a member of its \
                 configured group"
            );
            Err(Failure::new(Code::Forbidden, detail))
        }
        Some(Peer::Remote { address }) => {
            // A missing token costs what an unknown one costs, so that time tells nothing.
            let secret = bearer(headers).unwrap_or_default();
            let verified = api.host.tokens().verify(secret).await;
            Ok(verified.inspect_err(|_| tracing::warn!(%address, "a caller without a good token"))?)
        }
        None => Err(Failure::new(Code::Unauthenticated, "the connection has no identity")),
    }
}

/// The bearer token of the request (RFC 6750, section 2.1).
fn bearer(headers: &HeaderMap) -> Option<&str> {
    let (scheme, secret) = headers.get(header::AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| secret.trim())
}
