#![no_main]
fuzz::target!(|data| devices::fuzz::restored(data));
