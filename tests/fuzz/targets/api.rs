#![no_main]
fuzz::target!(|data| {
    // The first byte says what follows, and each room knows its own.
    http::fuzz::api(data);
    host::fuzz::text(data);
});
