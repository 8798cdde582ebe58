#![no_main]
fuzz::target!(|data| devices::fuzz::serial(data));
