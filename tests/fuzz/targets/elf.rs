#![no_main]
fuzz::target!(|data| vmm::fuzz::elf(data));
