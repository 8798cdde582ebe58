use super::*;

#[test]
fn the_first_ending_stands() {
    let bell = Bell::new().unwrap();
    bell.end(Ending::TripleFault);
    bell.end(Ending::PoweredOff);
    assert_eq!(bell.take().ending, Some(Ending::TripleFault));
    assert_eq!(bell.take(), News::default());
}

#[test]
fn faults_are_kept_in_order_and_bounded_in_number_and_length() {
    let bell = Bell::new().unwrap();
    for count in 0..FAULTS_MAX + 5 {
        bell.device_fault("disk0", format!("{count}{}", "ä".repeat(FAULT_BYTES_MAX)));
    }
    let news = bell.take();
    assert_eq!((news.faults.len(), news.faults_lost), (FAULTS_MAX, 5));
    assert!(news.faults[0].1.starts_with('0') && news.faults[1].1.starts_with('1'));
    assert!(news.faults.iter().all(|(_, detail)| detail.len() <= FAULT_BYTES_MAX));
}

#[test]
fn the_eventfd_is_readable_exactly_while_there_is_news() {
    let bell = Bell::new().unwrap();
    assert!(bell.event().read().is_err());
    bell.console();
    bell.console();
    assert!(bell.take().console);
    assert!(bell.event().read().is_err());
}

#[test]
fn a_guest_that_goes_on_is_told_so_often_and_then_counted() {
    let began = Instant::now();
    let mut pace = Pace { began, kept: 0 };
    for span in 0..2 {
        let now = began + Duration::from_millis(FAULTS_EVERY_MS) * span;
        assert!((0..FAULTS_MAX).all(|_| pace.keeps(now)));
        assert!(!pace.keeps(now) && !pace.keeps(now));
    }
    // Whether somebody looks between them or not.
    let bell = Bell::new().unwrap();
    *bell.pace.lock().unwrap() = Pace { began: Instant::now() + Duration::from_secs(3600), kept: FAULTS_MAX };
    bell.device_fault("disk0", "again".to_owned());
    let news = bell.take();
    assert_eq!((news.faults.len(), news.faults_lost), (0, 1));
}
