//! Who calls, and what a call carries besides its body. Made by `http`, read by every facade.
//! It knows no headers: `http` has taken them apart.
use model::{Code, TokenId};

use crate::error::{Error, Result};

/// Who does something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Actor {
    /// A user of this machine, through the Unix socket.
    Local {
        /// The user's id.
        uid: u32,
    },
    /// The holder of an access token.
    Token {
        /// The token's id.
        id: TokenId,
    },
    /// The guest inside a server.
    Guest,
    /// The host itself.
    Host,
}

impl std::fmt::Display for Actor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Actor::Local { uid } => write!(f, "local:{uid}"),
            Actor::Token { id } => write!(f, "token:{id}"),
            Actor::Guest => f.write_str("guest"),
            Actor::Host => f.write_str("host"),
        }
    }
}

/// What makes a call safe to repeat.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Idempotency {
    /// The caller's key.
    pub key: String,
    /// SHA-256 of method, path and body, in hexadecimal.
    pub fingerprint: String,
}

/// One mutating call.
#[derive(Debug, Clone)]
pub struct Call {
    /// Who calls.
    pub actor: Actor,
    /// Names the request in the log.
    pub request_id: String,
    /// Present when the call is safe to repeat.
    pub idempotency: Option<Idempotency>,
    /// `If-Match` as sent: `*`, or quoted entity tags separated by commas.
    pub if_match: Option<String>,
}

impl Call {
    /// A call of the host to itself, as in tests and on first start.
    pub fn by_host() -> Call {
        Call { actor: Actor::Host, request_id: String::new(), idempotency: None, if_match: None }
    }

    /// Fails with `stale_etag` unless the caller's `If-Match`, if any, names this generation.
    pub fn check_match(&self, generation: u64) -> Result<()> {
        let Some(wanted) = &self.if_match else { return Ok(()) };
        let current = etag(generation);
        if wanted.split(',').map(str::trim).any(|tag| tag == "*" || tag == current) {
            return Ok(());
        }
        Err(Error::new(
            Code::StaleEtag,
            format!("If-Match is {wanted}, but the resource is {current}; read it and try again"),
        ))
    }
}

/// The strong entity tag of a resource at this generation, quoted as the header wants it.
pub fn etag(generation: u64) -> String {
    format!("\"{generation}\"")
}

/// What a mutating call answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer<T> {
    /// The body.
    pub body: T,
    /// Whether it is the stored answer of an earlier call with the same key.
    pub replayed: bool,
}
