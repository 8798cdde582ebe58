//! The API over HTTP: paths, bodies, problem documents, streams, callers' identities. The only room that knows
//! HTTP; it knows no phases, processes or files, and asks `host` for everything.
//! `src/bin/toftd.rs` calls [`serve`].
#![forbid(unsafe_code)]

mod closing;
mod error;
pub mod limits;

mod body;
mod page;
mod path;
mod query;

mod edge;

mod call;

mod auth;

mod answer;
mod console;
mod stream;
mod upload;

mod handlers;

mod document;
mod routes;

mod serve;

pub use serve::{Bound, Config, Error, TcpListen, TlsFiles, UnixListen, bind, serve};

#[cfg(test)]
mod tests;
