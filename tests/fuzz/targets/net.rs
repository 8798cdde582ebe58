#![no_main]
fuzz::target!(|data| devices::fuzz::net(data));
