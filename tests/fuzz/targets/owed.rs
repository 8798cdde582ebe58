#![no_main]
fuzz::target!(|data| vmm::fuzz::owed(data));
