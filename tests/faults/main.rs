//! The real daemon when the host lacks something: a full disk, no address left, a system call that fails. Also every
//! verb of the command line on it. Needs root, a /dev/kvm of any kind, nftables and dnsmasq. Each test runs itself
//! again in namespaces of its own. `TOFT_LONG=1` runs the long forms.

#[path = "../support/world.rs"]
mod world;

mod images;
mod injected;
mod isolation;
mod refusals;
mod secrets;
mod shortages;
mod stage;
mod upgrades;
mod verbs;
mod words;
