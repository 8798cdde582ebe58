#![no_main]
fuzz::target!(|data| host::fuzz::used(data));
