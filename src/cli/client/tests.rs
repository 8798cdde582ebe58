//! How long a daemon is waited for, by a clock that goes on whenever nobody has anything to do.
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixListener;

use super::*;

/// A daemon that answers its one request late.
struct Late {
    directory: tempfile::TempDir,
    serving: tokio::task::JoinHandle<()>,
}

impl Late {
    /// It answers so long after it has got `last`, the end of the request.
    fn by(late: Duration, last: &'static [u8]) -> Late {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("sock")).unwrap();
        let serving = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let (mut heard, mut told) = (Vec::new(), false);
            while !heard.ends_with(last) {
                assert_ne!(
                    stream.read_buf(&mut heard).await.unwrap(),
                    0,
                    "it hung up in the midst of its request"
                );
                if !told && heard.windows(12).any(|some| some == b"100-continue") {
                    stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await.unwrap();
                    told = true;
                }
            }
            tokio::time::sleep(late).await;
            // Who asked may have gone.
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}").await;
        });
        Late { directory, serving }
    }

    fn client(&self) -> Client {
        Client::new(Endpoint::Unix(self.directory.path().join("sock")), None, None, false, None).unwrap()
    }

    async fn ended(self) {
        self.serving.await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn an_upload_of_any_kind_has_the_time_that_it_takes() {
    for kind in ["application/x-tar", "application/octet-stream"] {
        let daemon = Late::by(10 * limits::ANSWER_TIMEOUT, b"memory\r\n0\r\n\r\n");
        let path = daemon.directory.path().join("export");
        std::fs::write(&path, "memory").unwrap();
        let file = tokio::fs::File::open(&path).await.unwrap();
        let answer = daemon.client().upload("/v1/snapshots", kind, file, None, |_| {}).await.unwrap();
        assert_eq!(&answer.body[..], b"{}", "{kind}");
        daemon.ended().await;
    }
}

#[tokio::test(start_paused = true)]
async fn any_other_answer_that_does_not_come_is_missed() {
    let soon = Late::by(limits::ANSWER_TIMEOUT - Duration::from_secs(1), b"\r\n\r\n");
    soon.client().send("GET", "/v1/host", None, &[]).await.unwrap();
    soon.ended().await;
    let late = Late::by(limits::ANSWER_TIMEOUT + Duration::from_secs(1), b"\r\n\r\n");
    let Err(missed) = late.client().send("GET", "/v1/host", None, &[]).await else { panic!("an answer") };
    let Error::Http { cause, .. } = missed else { panic!("{missed}") };
    assert_eq!(cause.to_string(), "no answer within 90 s");
    late.ended().await;
}
