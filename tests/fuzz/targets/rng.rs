#![no_main]
fuzz::target!(|data| devices::fuzz::rng(data));
