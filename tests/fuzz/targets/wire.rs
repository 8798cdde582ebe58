#![no_main]
fuzz::target!(|data| wire::fuzz::wire(data));
