#![no_main]
fuzz::target!(|data| devices::fuzz::pci(data));
