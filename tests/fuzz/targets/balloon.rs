#![no_main]
fuzz::target!(|data| devices::fuzz::balloon(data));
