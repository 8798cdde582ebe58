#![no_main]
fuzz::target!(|data| vmm::fuzz::moved(data));
