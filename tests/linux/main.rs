//! Stock Linux servers, end to end: the real daemon, the real VMM, the reference guest. Needs root, a KVM that
//! runs Linux, and the images: a host with VT-x or SVM, or the lab. One at a time: they share the host's network.
#[path = "../support/toft.rs"]
mod toft;

mod debian;
mod identity;
mod power_cut;
mod ssh;
mod tiny;
mod two_hosts;
