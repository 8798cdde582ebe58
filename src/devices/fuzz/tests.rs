use std::path::Path;

/// Replays every seed of a target.
fn replay(target: &str, body: fn(&[u8])) {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fuzz/seeds").join(target);
    let mut count = 0;
    for entry in std::fs::read_dir(&seeds).unwrap() {
        let path = entry.unwrap().path();
        println!("{}", path.display());
        body(&std::fs::read(&path).unwrap());
        count += 1;
    }
    assert!(count > 0, "{} is empty", seeds.display());
}

#[test]
fn seeds_of_the_queue_hold() {
    replay("queue", super::queue);
}

// virtio 1.2: 2.7.5.1-1
#[test]
fn seeds_of_the_disk_hold() {
    replay("block", super::block);
}

// virtio 1.2: 2.7.5.1-1
#[test]
fn seeds_of_the_interface_hold() {
    replay("net", super::net);
}

#[test]
fn seeds_of_the_entropy_device_hold() {
    replay("rng", super::rng);
}

// virtio 1.2: 2.7.5.1-1
#[test]
fn seeds_of_the_balloon_hold() {
    replay("balloon", super::balloon);
}

#[test]
fn seeds_of_pci_hold() {
    replay("pci", super::pci);
}

#[test]
fn seeds_of_the_serial_port_hold() {
    replay("serial", super::serial);
}
