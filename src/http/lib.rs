//! The API over HTTP: paths, bodies, problem documents, streams, callers' identities. The only room that knows
//! HTTP; it knows no phases, processes or files, and asks `host` for everything.
//! `src/bin/toftd.rs` calls [`serve`].
#![forbid(unsafe_code)]

mod closing;
mod error;
pub mod limits;

mod body;
mod json;
mod page;
mod path;
mod query;

mod edge;

mod call;

mod auth;
mod kept;

mod answer;
mod console;
mod stream;
mod upload;

mod handlers;

mod document;
mod routes;

mod serve;

#[cfg(any(test, fuzzing))]
pub mod fuzz;

pub use serve::{Bound, Config, Error, TcpListen, TlsFiles, UnixListen, bind, serve};

#[cfg(test)]
#[path = "../../tests/support/fake_vmm.rs"]
#[allow(dead_code, unreachable_pub, reason = "shared with the tests of other rooms, which use all of it")]
mod fake_vmm;
#[cfg(test)]
#[path = "../../tests/support/stage.rs"]
#[allow(dead_code, unreachable_pub, reason = "shared with the tests of other rooms, which use all of it")]
mod stage;
#[cfg(test)]
mod tests;
