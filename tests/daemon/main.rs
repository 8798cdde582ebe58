//! The real daemon with the real launcher and VMM on the probe guest, killed wherever it hurts. Needs root, a
//! /dev/kvm of any kind, nftables and dnsmasq. Each test runs itself again in namespaces of its own, so tests run
//! beside each other and what they leave can be counted.
//! `TOFT_LONG=1` runs the long forms.

#[path = "../support/api.rs"]
mod api;
#[path = "../support/daemon.rs"]
mod daemon;
#[path = "../support/world.rs"]
mod world;

mod clones;
mod deaths;
mod held;
mod hostile;
mod kills;
mod live;
mod moves;
mod reboots;
mod restores;
mod settles;
mod shells;
mod snapshots;
mod sweep;
mod upgrades;
