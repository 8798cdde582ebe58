//! Each target with the seeds kept for it, and with inputs near them.
use seeds::INPUTS;

#[test]
fn seeds_of_the_queue_hold() {
    seeds::replay("queue", super::queue);
}

// virtio 1.2: 2.7.5.1-1
#[test]
fn seeds_of_the_disk_hold() {
    seeds::replay("block", super::block);
}

// virtio 1.2: 2.7.5.1-1
#[test]
fn seeds_of_the_interface_hold() {
    seeds::replay("net", super::net);
}

#[test]
fn seeds_of_the_entropy_device_hold() {
    seeds::replay("rng", super::rng);
}

// virtio 1.2: 2.7.5.1-1
#[test]
fn seeds_of_the_balloon_hold() {
    seeds::replay("balloon", super::balloon);
}

#[test]
fn seeds_of_pci_hold() {
    seeds::replay("pci", super::pci);
}

#[test]
fn seeds_of_the_serial_port_hold() {
    seeds::replay("serial", super::serial);
}

#[test]
fn seeds_of_what_is_restored_hold() {
    seeds::replay("restored", super::restored);
}

#[test]
fn inputs_near_the_seeds_of_the_queue_hold() {
    seeds::vary("queue", INPUTS, super::queue);
}

#[test]
fn inputs_near_the_seeds_of_the_disk_hold() {
    seeds::vary("block", INPUTS, super::block);
}

#[test]
fn inputs_near_the_seeds_of_the_interface_hold() {
    seeds::vary("net", INPUTS, super::net);
}

#[test]
fn inputs_near_the_seeds_of_the_entropy_device_hold() {
    seeds::vary("rng", INPUTS, super::rng);
}

#[test]
fn inputs_near_the_seeds_of_the_balloon_hold() {
    seeds::vary("balloon", INPUTS, super::balloon);
}

#[test]
fn inputs_near_the_seeds_of_pci_hold() {
    seeds::vary("pci", INPUTS, super::pci);
}

#[test]
fn inputs_near_the_seeds_of_the_serial_port_hold() {
    seeds::vary("serial", INPUTS, super::serial);
}

#[test]
fn inputs_near_the_seeds_of_what_is_restored_hold() {
    seeds::vary("restored", INPUTS, super::restored);
}
