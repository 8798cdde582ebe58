#![no_main]
fuzz::target!(|data| devices::fuzz::block(data));
