#![no_main]
fuzz::target!(|data| devices::fuzz::queue(data));
