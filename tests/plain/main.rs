//! Tests that need neither root nor KVM nor a network: what plain `cargo test` runs.
mod conformance;
mod claims;
mod map;
mod panics;
mod walls;
