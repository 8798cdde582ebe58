//! Tests that need /dev/kvm and nothing else: a real `toft-vmm`, driven through the wire, runs the probe guest.
//! Stock Linux is the business of `tests/linux`.

#[path = "../support/vmm_driver.rs"]
mod vmm_driver;

mod copies;
mod devices;
mod dirty;
mod handover;
mod held;
mod hostile;
mod incremental;
mod jail;
mod launcher;
mod machine;
mod migrate;
mod overlay;
mod owed;
mod peers;
mod probe_guest;
mod registers;
mod run;
mod sandbox;
mod saved;
mod settle;
mod torn;
