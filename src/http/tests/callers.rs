//! Who may call, over which socket.
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::time::Duration;

use model::Code;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixListener};
use tokio::time::Instant;

use super::served::{Sent, Served, within};
use crate::auth::Trusted;
use crate::limits::{BODY_READ_MAX, HEAD_READ_MAX};
use crate::{Config, Error, TcpListen, TlsFiles, UnixListen};

#[tokio::test]
async fn the_port_asks_for_a_token_before_it_says_anything() {
    let served = Served::start().await;
    let good = format!("Bearer {}", served.token);
    for path in ["/v1", "/v1/servers", "/v1/nothing", "/v1/openapi.json", "/errors", "/metrics"] {
        for refused in ["", "Bearer", "Bearer x", "Basic dXNlcjpwYXNz", &good[..good.len() - 1]] {
            let sent = Sent::nothing().with("authorization", refused);
            let answer = served.call_tcp("GET", path, sent).await;
            answer.problem(Code::Unauthenticated);
            assert!(answer.header("www-authenticate").starts_with("Bearer"));
        }
        served.call_tcp("GET", path, Sent::nothing()).await.problem(Code::Unauthenticated);
    }
    let answer =
        served.call_tcp("GET", "/v1/openapi.json", Sent::nothing().with("authorization", &good)).await;
    assert_eq!(answer.status, 200);
    served.stop().await;
}

#[tokio::test]
async fn the_socket_trusts_its_own_user_without_a_token() {
    let served = Served::start().await;
    let answer = served.call("GET", "/v1/openapi.json", Sent::nothing()).await;
    assert_eq!(answer.status, 200);
    let document: serde_json::Value = answer.json(200);
    assert_eq!(document["openapi"], "3.1.0");
    assert_eq!(answer.header("x-content-type-options"), "nosniff");
    served.stop().await;
}

#[test]
fn other_users_are_trusted_through_the_group_only() {
    let own = nix::unistd::geteuid().as_raw();
    let nobody = own.wrapping_add(54321);
    assert!(Trusted::new(None).trusts(0, 0, None));
    assert!(Trusted::new(None).trusts(own, 7, None));
    assert!(!Trusted::new(None).trusts(nobody, 0, None));
    assert!(Trusted::new(Some(7)).trusts(nobody, 7, None));
    assert!(!Trusted::new(Some(7)).trusts(nobody, 8, None));
    // Supplementary groups are those of the process itself.
    let mine = nix::unistd::getgroups().unwrap();
    if let Some(group) = mine.first() {
        assert!(Trusted::new(Some(group.as_raw())).trusts(nobody, u32::MAX, Some(std::process::id() as i32)));
    }
    let absent = (1..).find(|id| !mine.iter().any(|group| group.as_raw() == *id)).unwrap();
    assert!(!Trusted::new(Some(absent)).trusts(nobody, u32::MAX, Some(std::process::id() as i32)));
}

fn unix(path: std::path::PathBuf) -> Config {
    Config { unix: Some(UnixListen { path, group_id: None }), tcp: None }
}

#[tokio::test]
async fn the_socket_is_for_its_owner_and_replaces_a_dead_one() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.sock");
    drop(UnixListener::bind(&path).unwrap());
    let bound = crate::bind(&unix(path.clone())).await.unwrap();
    let found = std::fs::metadata(&path).unwrap();
    assert!(found.file_type().is_socket());
    assert_eq!(found.permissions().mode() & 0o777, 0o600);
    assert!(!directory.path().join("a.sock.new").exists());

    assert!(matches!(crate::bind(&unix(path.clone())).await, Err(Error::Busy(busy)) if busy == path));
    drop(bound);
    assert!(!path.exists());
}

#[tokio::test]
async fn what_is_no_socket_is_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.sock");
    std::fs::write(&path, "precious").unwrap();
    assert!(matches!(crate::bind(&unix(path.clone())).await, Err(Error::NotASocket(_))));
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
}

#[tokio::test]
async fn a_path_too_long_for_a_socket_is_named() {
    let path = std::env::temp_dir().join("x".repeat(120));
    assert!(matches!(crate::bind(&unix(path)).await, Err(Error::PathTooLong { max: 103, .. })));
}

#[tokio::test]
async fn nothing_but_loopback_is_served_without_tls() {
    for address in ["0.0.0.0:0", "[::]:0", "192.0.2.1:80", "[::ffff:192.0.2.1]:80"] {
        let tcp = Some(TcpListen { address: address.parse().unwrap(), tls: None });
        let refused = crate::bind(&Config { unix: None, tcp }).await.unwrap_err();
        assert!(matches!(refused, Error::Plain(_)), "{refused}");
        assert!(refused.to_string().contains("TLS"), "{refused}");
    }
    for address in ["127.0.0.1:0", "127.1.2.3:0", "[::ffff:127.0.0.1]:0"] {
        let tcp = Some(TcpListen { address: address.parse().unwrap(), tls: None });
        crate::bind(&Config { unix: None, tcp }).await.unwrap();
    }
    assert!(matches!(crate::bind(&Config::default()).await, Err(Error::Nowhere)));
}

#[tokio::test]
async fn a_bad_certificate_is_found_before_anything_is_served() {
    let directory = tempfile::tempdir().unwrap();
    let (certificates, key) = (directory.path().join("cert.pem"), directory.path().join("key.pem"));
    std::fs::write(&certificates, "nonsense").unwrap();
    std::fs::write(&key, "nonsense").unwrap();
    let tls = Some(TlsFiles { certificates: certificates.clone(), key });
    let tcp = Some(TcpListen { address: "0.0.0.0:0".parse().unwrap(), tls });
    let refused = crate::bind(&Config { unix: None, tcp }).await.unwrap_err();
    assert!(matches!(&refused, Error::Tls { path, .. } if *path == certificates), "{refused}");
}

/// Reads until the other side closes.
async fn to_the_end(mut stream: TcpStream) -> Vec<u8> {
    let mut all = Vec::new();
    let _ = within(stream.read_to_end(&mut all)).await;
    all
}

#[tokio::test]
async fn what_is_not_http_is_answered_and_closed() {
    let served = Served::start().await;
    for nonsense in
        ["\r\n\r\nnonsense\r\n\r\n", "GET / HTTP/9.9\r\n\r\n", "\u{16}\u{3}\u{1}\u{2}\u{0}\r\n\r\n"]
    {
        let mut stream = TcpStream::connect(served.tcp).await.unwrap();
        stream.write_all(nonsense.as_bytes()).await.unwrap();
        let answer = to_the_end(stream).await;
        assert!(answer.starts_with(b"HTTP/1.1 400"), "{nonsense:?}: {}", String::from_utf8_lossy(&answer));
    }
    let mut stream = TcpStream::connect(served.tcp).await.unwrap();
    let long = format!("GET / HTTP/1.1\r\nx: {}", "x".repeat(2 * crate::limits::HEAD_BYTES_MAX));
    let _ = stream.write_all(long.as_bytes()).await;
    assert!(to_the_end(stream).await.starts_with(b"HTTP/1.1 431"));
    served.stop().await;
}

/// Sends this and tells when the daemon gives the connection up.
async fn given_up_after(served: &Served, sent: &str) -> (Duration, Vec<u8>) {
    let mut stream = TcpStream::connect(served.tcp).await.unwrap();
    stream.write_all(sent.as_bytes()).await.unwrap();
    // From here on time passes as soon as nobody has anything to do.
    tokio::time::pause();
    let begun = Instant::now();
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    tokio::time::resume();
    (begun.elapsed(), answer)
}

#[tokio::test]
async fn a_slow_or_silent_client_does_not_keep_a_connection() {
    let served = Served::start().await;
    for head in ["", "GET /v1 HTTP/1.1\r\nhost: to"] {
        let (after, answer) = given_up_after(&served, head).await;
        assert!(after <= HEAD_READ_MAX + Duration::from_secs(1), "{head:?} was waited for {after:?}");
        assert!(after >= HEAD_READ_MAX - Duration::from_secs(1), "{head:?} was given up after {after:?}");
        assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 408"), "{answer:?}");
    }
    served.stop().await;
}

#[tokio::test]
async fn a_body_that_does_not_arrive_is_a_timeout() {
    let served = Served::start().await;
    let head = format!(
        "POST /v1/servers HTTP/1.1\r\nhost: toft\r\nauthorization: Bearer {}\r\ncontent-type: application/json\r\n\
         content-length: 100\r\n\r\n{{",
        served.token
    );
    let (after, answer) = given_up_after(&served, &head).await;
    assert!(after >= BODY_READ_MAX - Duration::from_secs(1), "given up after {after:?}");
    let text = String::from_utf8_lossy(&answer);
    assert!(text.starts_with("HTTP/1.1 408") && text.contains("application/problem+json"), "{text}");
    served.stop().await;
}

#[tokio::test]
async fn tokens_travel_over_tls_where_it_is_configured() {
    let directory = tempfile::tempdir().unwrap();
    let (certificates, key) = (directory.path().join("cert.pem"), directory.path().join("key.pem"));
    let made = rcgen::generate_simple_self_signed(["toft.test".to_owned()]).unwrap();
    std::fs::write(&certificates, made.cert.pem()).unwrap();
    std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
    let tls = Some(TlsFiles { certificates, key });
    let tcp = Some(TcpListen { address: "127.0.0.1:0".parse().unwrap(), tls });
    let served = Served::start().await;
    let bound = crate::bind(&Config { unix: None, tcp }).await.unwrap();
    let address = bound.tcp_address().unwrap();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let host = served.host.clone();
    let second = tokio::spawn(async move { bound.serve(host, async { drop(stopped.await) }).await });

    let mut roots = rustls::RootCertStore::empty();
    roots.add(made.cert.der().clone()).unwrap();
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    let client = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let connector = tokio_rustls::TlsConnector::from(std::sync::Arc::new(client));
    let stream = TcpStream::connect(address).await.unwrap();
    let mut stream = within(connector.connect("toft.test".try_into().unwrap(), stream)).await.unwrap();
    let request = format!(
        "GET /v1/networks HTTP/1.1\r\nhost: toft\r\nconnection: close\r\nauthorization: Bearer {}\r\n\r\n",
        served.token
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    within(stream.read_to_end(&mut answer)).await.unwrap();
    assert!(answer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&answer));

    let mut plain = TcpStream::connect(address).await.unwrap();
    plain.write_all(request.as_bytes()).await.unwrap();
    assert!(!to_the_end(plain).await.starts_with(b"HTTP/"));
    stop.send(()).unwrap();
    within(second).await.unwrap();
    served.stop().await;
}
