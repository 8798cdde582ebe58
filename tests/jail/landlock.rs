//! Landlock by itself: with other walls left out, what a VMM's own domain still refuses.
use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};

use serde_json::{Value, json};
use sys::jail::Step;

use crate::calls::call;
use crate::cell::{Cell, fresh_id};
use crate::walls::{Bait, NOTHING_BUT_IDS};

/// Version of the kernel's interface; nothing where it has none or it is switched off.
fn version() -> Option<usize> {
    const VERSION: usize = 1;
    call(libc::SYS_landlock_create_ruleset, &[0, 0, VERSION]).ok()
}

/// The attack gets through the hole, and no more once the domain is entered.
#[track_caller]
fn refused(uid: u32, hole: &[Step], order: &Value) {
    if let Err(why) = Cell::start(uid, hole, &[]).order(order) {
        panic!("{order} proves nothing: without {hole:?} it is refused as well: {why}");
    }
    let mut order = order.clone();
    order["landlock"] = true.into();
    match Cell::start(uid, hole, &[]).order(&order) {
        Ok(what) => panic!("{order} gets {what} in spite of Landlock"),
        Err(why) => assert!(
            why.contains("Permission denied") || why.contains("Operation not permitted"),
            "{order} is refused, but not by Landlock: {why}"
        ),
    }
}

#[test]
fn landlock_refuses_files_where_the_root_is_the_hosts() {
    if version().is_none() {
        return eprintln!("skipped: Landlock: this kernel has none");
    }
    let bait = Bait::new();
    let file = bait.path("file");
    for attack in ["open", "open_upwards", "open_for_writing", "open_through_ring"] {
        refused(fresh_id(), &[Step::Root], &json!({"attack": attack, "path": file}));
    }
    refused(fresh_id(), &[Step::Root], &json!({"attack": "list", "path": bait.directory.path()}));
    refused(fresh_id(), &[Step::Root], &json!({"attack": "create", "path": bait.path("new")}));
}

#[test]
fn landlock_refuses_connections_where_the_network_is_the_hosts() {
    let Some(version) = version() else { return eprintln!("skipped: Landlock: this kernel has none") };
    if version < 4 {
        return eprintln!("skipped: Landlock and networks: this kernel has version {version}, and not 4");
    }
    let inet = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = inet.local_addr().unwrap().to_string();
    refused(fresh_id(), &[Step::NetNamespace], &json!({"attack": "connect_inet", "address": address}));
    if version < 6 {
        return eprintln!(
            "skipped: Landlock and abstract names: this kernel has version {version}, and not 6"
        );
    }
    let name = format!("toft-landlock-{}", std::process::id());
    let _abstract = UnixListener::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
    refused(fresh_id(), &[Step::NetNamespace], &json!({"attack": "connect_abstract", "name": name}));
}

#[test]
fn landlock_refuses_signals_where_processes_are_the_hosts() {
    match version() {
        Some(6..) => {}
        version => {
            return eprintln!(
                "skipped: Landlock and signals: this kernel has version {version:?}, and not 6"
            );
        }
    }
    let uid = fresh_id();
    let mut victim = Cell::start(uid, NOTHING_BUT_IDS, &[]);
    victim.order(&json!({"attack": "stay", "then": "wait"})).unwrap();
    refused(uid, &[Step::PidNamespace], &json!({"attack": "signal", "pid": victim.started.pid}));
}
