use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;

#[tokio::test(start_paused = true)]
async fn a_reader_that_takes_nothing_is_given_up_after_the_bound() {
    let (near, _far) = tokio::io::duplex(16);
    let mut stream = Stall::new(near);
    let started = Instant::now();
    let ended = stream.write_all(&[0; 64]).await;
    assert_eq!(ended.unwrap_err().kind(), io::ErrorKind::TimedOut);
    assert_eq!(started.elapsed().as_secs(), WRITE_STALL_MAX.as_secs());
}

#[tokio::test(start_paused = true)]
async fn a_slow_reader_that_takes_something_is_kept() {
    let (near, mut far) = tokio::io::duplex(16);
    let reader = tokio::spawn(async move {
        let mut taken = 0;
        let mut piece = [0; 16];
        while taken < 64 {
            tokio::time::sleep(WRITE_STALL_MAX / 2).await;
            taken += far.read(&mut piece).await.unwrap();
        }
        taken
    });
    Stall::new(near).write_all(&[0; 64]).await.unwrap();
    assert_eq!(reader.await.unwrap(), 64);
}
