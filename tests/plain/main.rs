//! Tests that need neither root nor KVM nor a network: what plain `cargo test` runs.
mod bench;
mod claims;
mod commands;
mod conformance;
mod map;
mod panics;
mod plants;
mod points;
mod walls;
