#![no_main]
fuzz::target!(|data| vmm::fuzz::state(data));
